"""Kinds of optimizers on the line: a turn is undone whole, and a clan that changes nothing changes nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from clantune_scale.core.rounds import PhaseKind
from clantune_scale.runtime.line.snapshot import TrainingSnapshot
from tests.runtime.line.test_optimizers import Net, attach
from tests.runtime.line.test_points import Lion


class Tokens(torch.nn.Module):
    """An embedding with sparse gradients, and nothing else that trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(12, 4, sparse=True)
        self.register_buffer("readout", torch.randn(4))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((self.table(tokens) @ self.readout).sum(dim=1, keepdim=True) - targets).square().mean()


class Waves(torch.nn.Module):
    """Complex weights, a real loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Parameter(0.3 * torch.randn(6, 3, dtype=torch.complex64))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((inputs.to(self.mix.dtype) @ self.mix).abs().sum(dim=1, keepdim=True) - targets).square().mean()


class EightBit(torch.optim.Optimizer):
    """Momentum in 8 bits with a scale for each row, as block-wise 8-bit optimizers keep it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                rows = p.grad.reshape(p.shape[0], -1)
                own = self.state[p]
                if not own:
                    own["codes"] = torch.zeros(rows.shape, dtype=torch.int8)
                    own["absmax"] = torch.ones(rows.shape[0], 1)
                    own["step"] = 0
                own["step"] += 1
                momentum = 0.9 * own["codes"].float() * own["absmax"] / 127 + rows
                own["absmax"].copy_(momentum.abs().amax(dim=1, keepdim=True).clamp(min=1e-12))
                own["codes"].copy_((127 * momentum / own["absmax"]).round())
                p.add_(momentum.reshape(p.shape), alpha=-group["lr"])


@dataclass(frozen=True)
class Kind:
    """A model, its data and its optimizer.

    Attributes:
        make: parameters to an optimizer.
        model: what trains.
        package: that the optimizer is from; None for torch or this file.
    """

    make: Callable[[Any], torch.optim.Optimizer]
    model: Callable[[], torch.nn.Module] = Net
    package: str | None = None


def _of(package: str, name: str, **settings: Any) -> Kind:
    return Kind(lambda p: getattr(importlib.import_module(package), name)(p, **settings), package=package)


KINDS = {
    "lion": Kind(lambda p: Lion(p, lr=0.003, weight_decay=0.1)),
    "adafactor": Kind(lambda p: torch.optim.Adafactor(p, lr=0.05)),
    "adagrad": Kind(lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1)),
    "radam": Kind(lambda p: torch.optim.RAdam(p, lr=0.02)),
    "8-bit": Kind(lambda p: EightBit(p, lr=0.02)),
    "sparse-sgd": Kind(lambda p: torch.optim.SGD(p, lr=0.05), Tokens),
    "sparse-adam": Kind(lambda p: torch.optim.SparseAdam(p, lr=0.03), Tokens),
    "complex-adamw": Kind(lambda p: torch.optim.AdamW(p, lr=0.02), Waves),
    "complex-sgd": Kind(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), Waves),
    "prodigy": _of("prodigyopt", "Prodigy", lr=1.0, d0=1e-3),
    "schedule-free adamw": _of("schedulefree", "AdamWScheduleFree", lr=0.02, warmup_steps=5),
    "schedule-free sgd": _of("schedulefree", "SGDScheduleFree", lr=0.3),
    "lion of a package": _of("pytorch_optimizer", "Lion", lr=0.003),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def examples(model: torch.nn.Module, count: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Tokens):
        tokens = torch.randint(12, (count, 3), generator=generator)
        return TensorDataset(tokens, torch.sin(tokens.float().sum(dim=1, keepdim=True)))
    inputs = torch.randn(count, 6, generator=generator)
    return TensorDataset(inputs, torch.sin(inputs.sum(dim=1, keepdim=True)) + (2.0 if isinstance(model, Waves) else 0))


def start(kind: Kind, directory: Any = None, **block: Any) -> tuple[Any, torch.nn.Module, torch.optim.Optimizer]:
    if kind.package is not None:
        pytest.importorskip(kind.package)
    model = kind.model()
    optimizer = kind.make([p for p in model.parameters() if p.requires_grad])
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    if directory is None:
        return None, model, optimizer
    clan = attach(directory, model, optimizer, eval_data=examples(model, 32), **block)
    return clan, model, optimizer


def one_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    model(*batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_kind
def test_a_control_clan_is_the_plain_run_to_the_last_bit(kind, tmp_path):
    _, plain, own = start(kind)
    batches = list(torch.utils.data.DataLoader(examples(plain), 8))
    for batch in batches:
        one_step(plain, own, batch)
    clan, model, optimizer = start(kind, tmp_path, strategy="control")
    for step in clan.steps(batches, until=8):
        for batch in step:
            one_step(model, optimizer, batch)
    assert are_equal(weights(model), weights(plain)) and not are_equal(weights(model), weights(kind.model()))


@every_kind
@pytest.mark.parametrize("before", [0, 3], ids=["before its first step", "in mid-run"])
def test_a_turn_that_is_taken_again_ends_where_it_ended(kind, before, tmp_path):
    clan, model, optimizer = start(kind, tmp_path, strategy="control", round_length=1000)
    batches = list(torch.utils.data.DataLoader(examples(model), 8))
    for batch in batches[:before]:
        one_step(model, optimizer, batch)
    held = TrainingSnapshot(clan.state(), clan.backend)
    ends = []
    for _ in range(2):
        for batch in batches[before : before + 4]:
            one_step(model, optimizer, batch)
        ends.append(weights(model))
        held.restore(clan.state, clan.backend)
    assert are_equal(*ends)


@every_kind
def test_a_clan_searches_takes_turns_and_goes_on(kind, tmp_path):
    clan, model, optimizer = start(kind, tmp_path)
    for step in clan.steps(clan.loader(examples(model)), until=45):
        for batch in step:
            one_step(model, optimizer, batch)
    rounds = list(clan.progress.lineage)
    assert clan.num_steps == 45
    assert any(phase.kind is PhaseKind.COMPETITIVE for record in rounds for phase in record.phases)
    assert all(len(set(record.losses)) > 1 for record in rounds[:2])
    assert clan.fitness.mean.min() < rounds[0].losses[0]
    assert clan.finish().champion is not None
