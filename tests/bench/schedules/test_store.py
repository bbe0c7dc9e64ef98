"""Finished trials on disk: what is the same is not run again, and what differs is."""

from __future__ import annotations

import math

import pytest

from clantune_scale.bench.schedules import store as module
from clantune_scale.bench.schedules.methods import FIXED, WARMUP_LINEAR
from clantune_scale.bench.schedules.store import Store
from clantune_scale.bench.schedules.trial import Trial, TrialRun
from tests.bench.schedules.tiny_problem import TINY

TRIAL = Trial("fixed", "tiny", ((TrialRun(math.inf, 1.0, ((0, 0.1),), 2, ((40, 0.5),)),),), 0.1)


class Runs:
    """Counts how often something ran."""

    def __init__(self, result) -> None:
        self.result, self.count = result, 0

    def __call__(self):
        self.count += 1
        return self.result


def test_a_trial_comes_back_as_it_was_and_is_run_once(tmp_path):
    run = Runs(TRIAL)
    for _ in range(2):
        assert Store(tmp_path).trial(FIXED, TINY, [0.1], [0], run) == TRIAL
    assert run.count == 1
    losses = Runs([1.0, math.inf])
    assert [Store(tmp_path).losses("oracle", TINY, [0, 1], losses) for _ in range(2)] == [[1.0, math.inf]] * 2
    assert losses.count == 1


def test_whatever_else_decides_a_result_is_another_trial(tmp_path, monkeypatch):
    run = Runs(TRIAL)
    store = Store(tmp_path)
    store.trial(FIXED, TINY, [0.1], [0], run)
    others = [
        (WARMUP_LINEAR, TINY, [0.1], [0]),
        (FIXED, TINY.variant("tiny", schedule="linear"), [0.1], [0]),
        (FIXED, TINY.variant("tiny", knows_length=False), [0.1], [0]),
        (FIXED, TINY.variant("tiny", total_steps=50), [0.1], [0]),
        (FIXED, TINY.variant("tiny", starts=TINY.starts[:1]), [0.1], [0]),
        (FIXED, TINY, [0.2], [0]),
        (FIXED, TINY, [0.1], [1]),
    ]
    for number, other in enumerate(others, 2):
        store.trial(*other, run)
        assert run.count == number
    monkeypatch.setattr(module, "code", lambda: "other sources")
    store.trial(FIXED, TINY, [0.1], [0], run)
    assert run.count == len(others) + 2


@pytest.mark.parametrize("store", [Store(), None], ids=["no folder", "not read"])
def test_without_a_folder_or_without_reading_everything_runs(store, tmp_path):
    run = Runs(TRIAL)
    for _ in range(2):
        (store or Store(tmp_path, reads=False)).trial(FIXED, TINY, [0.1], [0], run)
    assert run.count == 2
