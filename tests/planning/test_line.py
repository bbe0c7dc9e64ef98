"""What is predicted of members on the line is what a real clan on the line holds and does, in one process."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils.data import TensorDataset

import clantune_scale
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.planning.budget import Size, forecast
from clantune_scale.runtime.line.points import Points
from clantune_scale.runtime.validation_window import ValidationWindow
from tests.small_references import DROPOUT, LR

DECAY = Gene("weight_decay", relative=True)
NUM_STEPS, MICRO, ACCUMULATION = 120, 3, 2
#: A trial of four, long enough to be held in so short a run.
TRIAL = {"name": "clan", "options": {"trial_cost": 0.6, "trial_at": 0.15, "freeze_at": 0.8}}
DS = {"train_micro_batch_size_per_gpu": MICRO, "gradient_accumulation_steps": ACCUMULATION}


class Net(torch.nn.Module):
    """41 weights, and a dropout that a gene can set."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1)
        )

    def forward(self, inputs, targets):
        return ((self.layers(inputs) - targets) ** 2).mean()


class Counts:
    """The most that a clan held at any step, and what it did.

    Attributes:
        most: bytes, by where they were found.
        work: samples, "trained" and "evaluated".
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most: Counter[str] = Counter()
        self.work: Counter[str] = Counter()
        self._copied = 0
        kept, held, losses = Points._kept, Points.held, ValidationWindow.losses

        def counted_copy(points, tensor):
            copied = kept(points, tensor)
            self._copied += copied.numel() * copied.element_size()
            return copied

        @contextmanager
        def counted_hold(points):
            before = self._copied
            with held(points) as write:
                self.note("centre", self._copied - before)
                yield write

        def counted_losses(window, *args):
            self.work["evaluated"] += window.num_batches * MICRO
            return losses(window, *args)

        monkeypatch.setattr(Points, "_kept", counted_copy)
        monkeypatch.setattr(Points, "held", counted_hold)
        monkeypatch.setattr(ValidationWindow, "losses", counted_losses)

    def note(self, where: str, num_bytes: int) -> None:
        self.most[where] = max(self.most[where], num_bytes)

    def look(self, clan) -> None:
        """At the state between two steps."""
        by_kind: Counter[str] = Counter()
        for name, tensor in clan.state().tensors:
            by_kind[name.split(".")[0]] += tensor.numel() * tensor.element_size()
        self.note("average", by_kind["average"])
        self.note("saved", by_kind["line_start"] + by_kind["line_anchor"])
        self.note("sums", by_kind["line_decay"] + by_kind["line_average_decay"])
        self.note("line", sum(size for name, size in by_kind.items() if name.startswith("line_")))
        progress, turns = clan.progress, clan.members.turns
        self.note("guard", _size_of(progress.rollback_snapshot))
        if turns is not None:
            self.note("start", _size_of(turns.start._tensors))
            self.note("best", _size_of(turns.best[1]._tensors) if turns.best else 0)


def _size_of(snapshot) -> int:
    """Bytes of a snapshot's tensors; the optimizer's moments only once it has made them."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in snapshot.tensors)


def _train(tmp_path, block: dict, counts: Counts) -> None:
    model, inputs = Net(), torch.randn(24, 3)
    clan = clantune_scale.attach(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.004, weight_decay=0.1),
        config=DS | {"clantune": block | {"tracking": {"directory": str(tmp_path), "mlflow": False}}},
        eval_data=TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)),
    )
    optimizer = clan.backend._optimizers.parts[0]

    def batches():
        while True:
            drawn = torch.randn(MICRO, 3)
            yield drawn, drawn.sum(dim=1, keepdim=True)

    for step in clan.steps(batches(), until=NUM_STEPS):
        for batch in step:
            counts.work["trained"] += len(batch[0])
            (model(*batch) / ACCUMULATION).backward()
        optimizer.step()
        counts.look(clan)
        optimizer.zero_grad()
    clan.finish()


@pytest.mark.parametrize(
    ("population_size", "genes", "line"),
    [
        (4, (LR,), {}),
        (4, (LR,), {"go_on_from": "centre"}),
        (4, (LR, DECAY), {"store": "host"}),
        (5, (LR, DECAY), {}),
        (5, (LR, DECAY), {"go_on_from": "centre"}),
        (3, (LR, DROPOUT), {}),
    ],
    ids=["rate", "rate, from the centre", "on the host", "both in a round", "both, from the centre", "undone turns"],
)
def test_bytes_and_work_are_those_of_a_real_clan(population_size, genes, line, tmp_path, monkeypatch):
    described = {gene.name: {} if gene is not DROPOUT else {"initial": 0.1} for gene in genes}
    block = {"population_size": population_size, "members": "line", "round_length": 6, "total_steps": NUM_STEPS}
    block |= {"genes": described, "line": line, "strategy": TRIAL if DROPOUT not in genes else "clan"}
    block |= {
        "fitness": {"num_samples": 24, "batch_size": MICRO},
        "checkpoint": {"champion": False, "every_rounds": None},
    }
    counts = Counts(monkeypatch)
    torch.manual_seed(0)
    _train(tmp_path, block, counts)

    how = {"world_size": 1, "num_steps": NUM_STEPS, "hardware": None, "measured": None}
    parameters = tuple(parameter.numel() for parameter in Net().parameters())
    one = forecast(DS, ClanConfig.model_validate(block), genes, Size(parameters), **how)
    memory, most = one.memory, counts.most
    assert most["average"] == 41 * 4
    if line.get("store") == "host":
        assert (memory.average, memory.line, memory.centre) == (0, most["sums"], 0)
        arrays = most["saved"] + most["centre"]
        assert arrays == 3 * 41 * 4 and most["sums"] == 2 * 41 * 4
    else:
        assert (memory.average, memory.line, memory.centre) == (most["average"], most["line"], most["centre"])
        arrays = 0
    states = most["start"] + most["best"]
    assert states == (2 if DROPOUT not in genes else 1) * 4 * 41 * 4 and most["guard"] == 4 * 41 * 4
    assert memory.host == most["guard"] + (most["average"] - memory.average) + max(states, arrays)
    assert one.cost.trained_samples == counts.work["trained"] > one.cost.samples
    assert one.cost.evaluated_samples == counts.work["evaluated"]
    assert any(phase.kind is PhaseKind.COMPETITIVE for phase, _ in one.walk.phases)
