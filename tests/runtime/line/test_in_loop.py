"""A clan's part of a checkpoint that the loop writes, and a loop that shows its micro-batches itself."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from clantune_scale.core.rounds import PhaseKind
from clantune_scale.errors import CheckpointError
from tests.runtime.line.test_members import TRIAL, Run
from tests.small_references import network, samples

STEPS = 60
#: Rounds of 6 steps; the trial is in steps 18 to 42.
WITH_TRIAL: dict[str, Any] = {
    "total_steps": 120,
    "strategy": {"name": "clan", "options": TRIAL},
    "genes": {"lr": {}, "weight_decay": {"max_change": 0.3}},
}


class Loop:
    """A loop of a user's own that is given turns by a callable; the model has dropout."""

    def __init__(self, directory, **changes: Any) -> None:
        torch.manual_seed(0)
        self.run = Run(directory, network(0.1), changes={"train_step": self.train_step, **changes}, **WITH_TRIAL)
        self.clan = self.run.clan

    def train_step(self, calls) -> None:
        self.run.one_step([args for args, _ in calls])

    def train(self, until: int) -> None:
        for step in range(self.clan.num_steps, until):
            is_common = self.clan.phases.position.phase.kind is PhaseKind.COMPETITIVE
            micro = [samples(step, i, 0) if is_common else samples(step, 0, i) for i in range(4)]
            self.run.one_step(micro)

    def save(self) -> bytes:
        state = {
            "model": self.run.model.state_dict(),
            "optimizer": self.run.optimizer.state_dict(),
            "scheduler": self.run.scheduler.state_dict(),
            "streams": torch.get_rng_state(),
            "clan": self.clan.state_dict(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.run.model.load_state_dict(state["model"])
        self.run.optimizer.load_state_dict(state["optimizer"])
        self.run.scheduler.load_state_dict(state["scheduler"])
        self.clan.load_state_dict(state["clan"], source="a test")
        torch.set_rng_state(state["streams"])


def test_a_run_that_is_loaded_from_the_loops_checkpoint_equals_the_unbroken_one(tmp_path):
    whole, saved = Loop(tmp_path / "whole"), {}
    for step in (3, 12, 18, 25, 45):
        whole.train(step)
        saved[step] = whole.save()
    whole.train(STEPS)
    trial = next(r for r in whole.run.lineage if any(p.kind is PhaseKind.COMPETITIVE for p in r.phases))
    assert trial.start_step <= 25 < trial.end_step < 45
    for step, state in saved.items():
        part = Loop(tmp_path / f"from-{step}")
        part.load(state)
        assert part.clan.num_steps == step
        part.train(STEPS)
        assert list(part.run.lineage) == list(whole.run.lineage), step
        assert part.clan.population == whole.clan.population
        for ours, theirs in zip(part.run.model.parameters(), whole.run.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), step


def test_a_state_of_other_settings_is_refused(tmp_path):
    state = Loop(tmp_path / "one").clan.state_dict()
    other = Run(tmp_path / "two", population=5, **WITH_TRIAL)
    with pytest.raises(CheckpointError, match="population_size: 4 was saved, this launch has 5"):
        other.clan.load_state_dict(state, source="a test")
    with pytest.raises(CheckpointError, match="the form 0, and this version reads 1"):
        other.clan.load_state_dict(state | {"schema": 0}, source="a test")


def test_a_scheduler_that_ends_the_steps_can_be_saved(tmp_path):
    loop = Loop(tmp_path)
    loop.train(2)
    ours, theirs = loop.run.scheduler.state_dict(), torch.optim.lr_scheduler.ExponentialLR(loop.run.optimizer, 0.995)
    assert ours.keys() == theirs.state_dict().keys() and ours["last_epoch"] == 2
    torch.save(ours, io.BytesIO())
    kind = type(theirs)
    assert isinstance(loop.run.scheduler, kind)
    loop.clan.finish()
    assert type(loop.run.scheduler) is kind


def _drawn(folder, strategy) -> list[float]:
    """What a loop draws from torch's streams before each of its steps."""

    def train_step(calls) -> None:
        run.one_step([args for args, _ in calls])

    torch.manual_seed(0)
    run = Run(folder, total_steps=120, strategy=strategy, changes={"train_step": train_step})
    numbers = []
    for step in range(50):
        numbers.append(float(torch.rand(())))
        run.one_step([samples(step, 0, index) for index in range(4)])
    return numbers


def test_the_loop_goes_on_with_the_random_streams_of_its_own_steps(tmp_path):
    """It draws for its data; the turns of the others draw less, and must not turn the streams back."""
    clan = _drawn(tmp_path / "clan", WITH_TRIAL["strategy"])
    assert clan == _drawn(tmp_path / "control", "control") and len(set(clan)) == 50


def test_train_step_gets_what_the_loop_showed(tmp_path):
    """A loop whose micro-batches are more than the model's arguments."""
    shown, repeated = [], []

    def watch(on_batch, on_loss):
        hooks.update(on_batch=on_batch, on_loss=on_loss)
        return hooks.clear

    def one_step(micro) -> None:
        for name, inputs, targets in micro:
            hooks["on_batch"]((name, inputs, targets), {})
            loss = run.model(inputs, targets)
            hooks["on_loss"](loss)
            (loss / 4).backward()
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()

    def train_step(calls) -> None:
        repeated.append([args[0] for args, _ in calls])
        one_step([args for args, _ in calls])

    hooks: dict[str, Any] = {}
    run = Run(tmp_path, changes={"train_step": train_step, "watch": watch}, **WITH_TRIAL)
    for step in range(50):
        names = [f"{step}-{index}" for index in range(4)]
        shown.append(names)
        one_step([(name, *samples(step, 0, index)) for index, name in enumerate(names)])
    start, length = next((r.start_step, r.end_step - r.start_step) for r in run.lineage if len(r.phases[0].teams or ()))
    assert repeated == shown[start : start + length] * (len(repeated) // length) and len(repeated) == 3 * length
    run.clan.finish()
    assert hooks == {}
