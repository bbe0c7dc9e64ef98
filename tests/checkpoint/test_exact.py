"""A run that stops and goes on equals the one that does not, to the last bit."""

from __future__ import annotations

import pytest

from tests.backends.small_runs import ds_config, in_member_worlds
from tests.checkpoint.runs import launch, named, resumed
from tests.ranks import run_ranks
from tests.small_clans import clan_config

WHOLE = 23


def _whole_and_resumed(rank, config, stops, ends):
    """The uninterrupted run, and for each stop what differs from it in the run that was stopped there."""
    whole = launch(named(config, "whole"), WHOLE).exact
    different = {}
    for stop in stops:
        stopped = launch(named(config, f"stopped-{stop}"), stop, ends=ends)
        again = launch(resumed(config, stopped.run_dir), WHOLE, seeded=7)
        different[stop] = {key: (whole[key], again.exact[key]) for key in whole if whole[key] != again.exact[key]}
        assert again.run_dir == stopped.run_dir
    return different


def _check(config, stops, *, ranks=4, ends="stop"):
    results = run_ranks(ranks, in_member_worlds, _whole_and_resumed, config, stops, ends)
    assert results == [{stop: {} for stop in stops}] * ranks


# Round 0 is cooperative (the rates' round), round 1 ends with a competition that is rolled back (dropout's):
# stopped inside both kinds of phase, at a round's end, and right after the first step.
GENES = {"genes": ["lr", "dropout"], "duty_cycle": 0.4, "total_steps": 40}


@pytest.mark.parametrize(
    ("stage", "stops"),
    [
        (0, [9]),
        (1, [9, 12]),
        (3, [9]),
        pytest.param(0, [1, 10, 12, 17], marks=pytest.mark.slow),
        pytest.param(1, [1, 5, 10, 17, 21], marks=pytest.mark.slow),
        pytest.param(2, [1, 9, 10, 12, 17], marks=pytest.mark.slow),
        pytest.param(3, [1, 10, 12, 17], marks=pytest.mark.slow),
    ],
)
def test_every_stage_goes_on_to_the_last_bit(stage, stops, tmp_path):
    config = ds_config(stage, accumulation=2, clip=0.5)
    _check(clan_config(tmp_path, config, strategy="clan", **GENES), stops)


def test_sixteen_bit_weights_follow_from_the_masters(tmp_path):
    _check(clan_config(tmp_path, ds_config(2, dtype="bf16"), strategy="clan", **GENES), [9])


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("pbt", "hdet", "halving", "control")]


@pytest.mark.parametrize("strategy", ["classic", *SLOW])
def test_every_strategy_remembers(strategy, tmp_path):
    # Halving's first rungs end after 2, 10 and 20 of 200 steps.
    block = {
        "strategy": strategy,
        "total_steps": 200 if strategy == "halving" else 40,
        "duty_cycle": 0.4,
        "population_size": 2,
    }
    _check(clan_config(tmp_path, ds_config(0), **block), [3, 9, 15], ranks=2)


def test_steps_after_the_last_committed_round_are_done_again(tmp_path):
    config = clan_config(tmp_path, ds_config(1), strategy="clan", **GENES)
    _check(config, [8], ranks=2, ends="leave")


@pytest.mark.slow
def test_the_blocking_form_is_the_same(tmp_path):
    config = clan_config(tmp_path, ds_config(0), strategy="clan", checkpoint={"asynchronous": False}, **GENES)
    _check(config, [13], ranks=2, ends="leave")


# The clan's genes freeze after 16 steps: what a rate was then, it must know after 19 and cannot ask the schedule.
@pytest.mark.parametrize(("strategy", "stops"), [("classic", [9, 14]), ("clan", [19])])
def test_a_schedule_with_lists_and_moving_accumulation(strategy, stops, tmp_path):
    config = ds_config(1, accumulation=2) | {
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 40, "warmup_num_steps": 5}}
    }
    genes = {"lr": {}, "accumulation": {"kind": "specialized", "bounds": [1, 4], "step_size": 0.6}}
    block = {"strategy": strategy, "genes": genes, "duty_cycle": 0.4, "total_steps": 40}
    _check(clan_config(tmp_path, config, **block), stops, ranks=2)
