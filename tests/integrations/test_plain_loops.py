"""Training scripts as people write them: three lines make each a clan, and what cannot be guessed is asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import clantune_scale
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.errors import EvaluationError
from clantune_scale.tracking import read_events

VOCABULARY, CONTEXT, BATCH, STEPS = 11, 6, 4, 40
DATA = (torch.arange(3000) ** 2 % 97) % VOCABULARY


class GPT(torch.nn.Module):
    """As nanoGPT's: ``(logits, loss)``, the loss None without targets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1337)
        self.token, self.mix = torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8 * CONTEXT, 16)
        self.head = torch.nn.Linear(16, VOCABULARY * CONTEXT)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, Any]:
        hidden = torch.tanh(self.mix(self.token(idx).flatten(1)))
        logits = self.head(hidden).unflatten(1, (CONTEXT, VOCABULARY))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def get_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(2000, (BATCH,), generator=generator)
    windows = torch.stack([DATA[start : start + CONTEXT + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:]


def held_out() -> TensorDataset:
    windows = torch.stack([DATA[start : start + CONTEXT + 1] for start in range(2000, 2900, 30)])
    return TensorDataset(windows[:, :-1], windows[:, 1:])


def get_lr(it: int) -> float:
    """nanoGPT's: warm-up, then a cosine; the script writes it into the groups by hand."""
    return 0.01 * (it + 1) / 10 if it < 10 else 0.001 + 0.0045 * (1 + math.cos(math.pi * (it - 10) / 90))


def block(directory: Any, **changes: Any) -> dict[str, Any]:
    settings = {
        "population_size": 4,
        "members": "line",
        "round_length": 5,
        "total_steps": 100,
        "strategy": {"name": "clan", "options": {"trial_cost": 0.6, "trial_at": 0.09}},
        "fitness": {"num_samples": 24, "batch_size": 8},
        "tracking": {"directory": str(directory), "mlflow": False, "print_every_steps": 5},
        "checkpoint": {"champion": False, "every_rounds": None},
    }
    return settings | changes


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    return model(*batch)[1]


def nano_gpt(directory: Any, *, own_loop: bool) -> Any:
    """nanoGPT's loop with two micro-batches a step, as it is written there or over ``clan.steps``."""
    model, generator = GPT(), torch.Generator().manual_seed(1337)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95))
    options = {"evaluate": loss_of, "micro_batch_size": BATCH, "accumulation": 2}

    def train_step(calls: Any) -> None:
        for args, _ in calls:
            (model(*args)[1] / len(calls)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    data = held_out()
    if own_loop:
        clan = clantune_scale.attach(
            model, optimizer, config=block(directory), eval_data=data, train_step=train_step, **options
        )
        for it in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = get_lr(it)
            for _ in range(2):
                _, loss = model(*get_batch(generator))
                (loss / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return model, clan
    clan = clantune_scale.attach(model, optimizer, config=block(directory), eval_data=data, **options)
    for step in clan.steps(_endless(generator), until=STEPS):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(clan.num_steps)
        train_step([(batch, {}) for batch in step])
    return model, clan


def _endless(generator: torch.Generator) -> Iterator[Any]:
    while True:
        yield get_batch(generator)


def _lineage(clan: Any) -> list[Any]:
    return [(r.start_step, [p.kind for p in r.phases], list(r.losses), r.donors) for r in clan.progress.lineage]


def test_nano_gpts_own_loop_takes_the_turns_at_the_rates_that_it_writes_by_hand(tmp_path):
    model, clan = nano_gpt(tmp_path / "own", own_loop=True)
    assert clan.num_steps == STEPS
    kinds = {kind for _, kinds, *_ in _lineage(clan) for kind in kinds}
    assert kinds == set(PhaseKind)
    other, steps = nano_gpt(tmp_path / "steps", own_loop=False)
    assert _lineage(steps) == _lineage(clan)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_which_element_of_a_tuple_is_the_loss_is_asked_for_and_no_line_says_nan(tmp_path, capsys):
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(
        EvaluationError, match=r"a tuple of 2: a tensor of shape .* say which is the loss: pass evaluate"
    ):
        clantune_scale.attach(model, optimizer, config=block(tmp_path), eval_data=held_out(), micro_batch_size=BATCH)
    capsys.readouterr()
    nano_gpt(tmp_path / "run", own_loop=False)
    (run,) = (tmp_path / "run").iterdir()
    steps = [event for event in read_events(run / "events.jsonl") if event["kind"] == "step"]
    assert steps and all(event["loss"] is None for event in steps)
    said = capsys.readouterr().out
    assert "s/step" in said and not re.search(r"\bnan\b", said)


class Momentum(torch.optim.SGD):
    """Stands for Muon: another optimizer for matrices, whose momentum the script warms up."""


def test_two_optimizers_with_rates_and_momentum_by_hand_and_a_loss_outside_of_the_model(tmp_path):
    """As modded-nanogpt's speed runs are written; a control clan is the plain script to the last bit."""
    runs = [_modded(tmp_path, None), _modded(tmp_path, block(tmp_path, strategy="control", total_steps=STEPS))]
    for ours, theirs in zip(*(run.parameters() for run in runs), strict=True):
        assert torch.equal(ours, theirs)
    tuned = _modded(tmp_path / "tuned", block(tmp_path / "tuned"))
    assert not all(map(torch.equal, tuned.parameters(), runs[0].parameters()))


def _modded(directory: Any, config: dict[str, Any] | None) -> GPT:
    model, generator = GPT(), torch.Generator().manual_seed(7)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizers = [Momentum(matrices, lr=0.05, momentum=0.85), torch.optim.AdamW(rest, lr=0.01)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]

    def loss_outside(model: GPT, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten())

    def one_step(batches: Any, number: int) -> None:
        for batch in batches:
            loss_outside(model, batch).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - number / 200)
        optimizers[0].param_groups[0]["momentum"] = 0.85 + 0.1 * min(number / 20, 1)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    if config is None:
        for number in range(STEPS):
            one_step([get_batch(generator)], number)
        return model
    clan = clantune_scale.attach(
        model, optimizers, config=config, eval_data=held_out(), evaluate=loss_outside, micro_batch_size=BATCH
    )
    for step in clan.steps(_endless(generator), until=STEPS):
        one_step(step, clan.num_steps)
    clan.finish()
    return model
