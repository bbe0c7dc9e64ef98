"""A clan in the Trainer on two ranks: DDP and FSDP2, their checkpoints, and what ranks agree on."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightning", reason="the extra `lightning` is not installed")

from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from clantune_scale.core.rounds import PhaseKind
from tests.integrations.lightning.small import EPOCH, MICRO, Module, block, dataset, fit
from tests.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 38


class ShardedModule(Module):
    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def _strategy(kind: str) -> tuple[type[Module], Any]:
    from lightning.pytorch.strategies import ModelParallelStrategy

    if kind == "ddp":
        return Module, "ddp"
    return ShardedModule, ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def _fit(kind: str, directory: str, config: dict[str, Any] | None, **options: Any) -> Any:
    # As torchrun says that it has started the ranks.
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    made, strategy = _strategy(kind)
    rank = int(os.environ["RANK"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, trainer, callback = fit(
            directory,
            config,
            module=made(0.0),
            data=dataset(10 + rank, EPOCH * MICRO),
            devices=2,
            strategy=strategy,
            use_distributed_sampler=False,
            **options,
        )
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    found = torch.cat([weight.detach().flatten() for weight in weights]), trainer.global_step, _decided(callback)
    if dist.is_initialized():
        dist.barrier()
    return found


def _decided(callback: Any) -> Any:
    if callback is None:
        return None
    clan = callback.clan
    kinds = {phase.kind for record in clan.progress.lineage for phase in record.phases}
    return [list(record.losses) for record in clan.progress.lineage], clan.population, kinds


every_strategy = pytest.mark.parametrize("kind", ["ddp", "fsdp2"])


@every_strategy
def test_a_control_clan_is_the_plain_trainers_run(kind, tmp_path):
    plain = run_ranks(2, _fit, kind, str(tmp_path / "plain"), None, timeout_s=400)
    config = block(tmp_path, strategy="control", total_steps=40)
    for ours, theirs in zip(run_ranks(2, _fit, kind, str(tmp_path), config, timeout_s=400), plain, strict=True):
        assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1] == 40


def _whole_and_again(kind: str, directory: str) -> Any:
    config = block(directory)
    whole = _fit(kind, f"{directory}/whole", config, num_steps=STEPS, save_every=1)
    found = [whole]
    for step in (14, 33):  # in the middle of the trial, and after it
        path = Path(directory) / "whole" / "saved" / f"step={step}.ckpt"
        found.append(_fit(kind, f"{directory}/again", config, num_steps=STEPS, ckpt_path=path))
    return found


@every_strategy
def test_ranks_decide_alike_and_go_on_from_their_checkpoint_as_if_unbroken(kind, tmp_path):
    first, second = run_ranks(2, _whole_and_again, kind, str(tmp_path), timeout_s=800)
    losses, population, kinds = first[0][2]
    assert kinds == set(PhaseKind) and abs(population.genomes[0].values["lr"] - 1) > 0.1
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours[0], theirs[0]) and ours[2][:2] == theirs[2][:2]
        assert torch.equal(ours[0], first[0][0]) and ours[2][:2] == (losses, population) and ours[1] == STEPS
    files = sorted(path.name for path in (tmp_path / "whole" / "saved" / "step=14.ckpt").glob("clan/*"))
    assert files == (["complete.json", "rank-00000.pt", "rank-00001.pt"] if kind == "fsdp2" else [])
