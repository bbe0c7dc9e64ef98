"""Trainer on two ranks, under DDP and DeepSpeed, with a clan: against the plain run, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra transformers")

from clantune_scale.core.rounds import PhaseKind
from clantune_scale.integrations.transformers import ClanCallback
from tests.integrations.transformers.runs import STEPS, block, trainer_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _deepspeed(stage: int, *, own: bool = False) -> dict[str, Any]:
    """A config as Trainer's users write it; with ``own`` DeepSpeed's optimizer and scheduler."""
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
    }
    if own:
        adamw = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": adamw}
        warmup = {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        }
        config["scheduler"] = {"type": "WarmupDecayLR", "params": warmup}
    return config


CASES = {
    "ddp": None,
    "zero-1": _deepspeed(1),
    "zero-2": _deepspeed(2),
    "zero-2-own": _deepspeed(2, own=True),
    "zero-3": _deepspeed(3),
}


def _train(folder: str, deepspeed: dict | None, config: dict | None, resume: str | None, settings: dict) -> Any:
    import warnings

    warnings.filterwarnings("ignore")
    if deepspeed is not None:
        from clantune_scale.backends.deepspeed.engine import suppress_start_up_noise

        suppress_start_up_noise()
        # As a user would: the block is in DeepSpeed's file.
        deepspeed = deepspeed | ({"clantune": config} if config else {})
    callback = ClanCallback(None if deepspeed else config) if config else None
    trainer = trainer_of(Path(folder), callback, deepspeed=deepspeed, **settings)
    trainer.train(resume_from_checkpoint=resume)
    if deepspeed is not None and deepspeed["zero_optimization"]["stage"] == 3:
        import deepspeed as engine

        with engine.zero.GatheredParameters(list(trainer.model.parameters())):
            weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    else:
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    lineage = list(callback.clan.progress.lineage) if callback else []
    seen = [[batch["input_ids"].tolist() for batch in step] for step in trainer.seen]
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    return weights, lineage, seen, (trainer.state.global_step, trainer.state.epoch), rates


def _run(folder: Path, case: str, config: dict | None, resume: Path | None = None, **settings: Any) -> Any:
    checkpoint = None if resume is None else str(resume)
    arguments = (str(folder), CASES[case], config, checkpoint, settings)
    return run_ranks(2, _train, *arguments, timeout_s=600)


@pytest.mark.parametrize("case", CASES)
def test_a_control_clan_is_the_plain_run_to_the_last_bit(case, tmp_path):
    plain = _run(tmp_path / "plain", case, None, max_steps=8)
    clan = _run(tmp_path / "clan", case, block(strategy="control"), max_steps=8)
    for (weights, lineage, *seen), (expected, _, *theirs) in zip(clan, plain, strict=True):
        assert lineage and seen == theirs
        assert weights.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("case", CASES)
def test_a_clan_takes_its_turns_and_resumes_in_them(case, tmp_path):
    whole = _run(tmp_path / "whole", case, block(), save_strategy="steps", save_steps=4)
    plain = _run(tmp_path / "plain", case, None)
    kinds = {phase.kind for record in whole[0][1] for phase in record.phases}
    assert kinds == set(PhaseKind) and whole[0][1] == whole[1][1]
    for (_, _, *seen), (_, _, *theirs) in zip(whole, plain, strict=True):
        assert seen == theirs and seen[1][0] == STEPS
    for step in (4, 16):
        resumed = _run(
            tmp_path / f"from-{step}", case, block(), tmp_path / "whole" / f"checkpoint-{step}", save_steps=4
        )
        for (weights, lineage, *_), (expected, theirs, *_) in zip(resumed, whole, strict=True):
            assert len(lineage) == len(theirs) == 4
            for ours, other in zip(lineage, theirs, strict=True):
                assert ours.donors == other.donors
                # DDP regroups its sums in the first step after a start.
                assert ours.losses == pytest.approx(other.losses, rel=1e-4)
            for name, tensor in weights.items():
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)
