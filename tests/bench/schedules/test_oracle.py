from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import resources

import pytest
import torch

from clantune_scale.bench.schedules.benchmark import run, settled
from clantune_scale.bench.schedules.methods import FIXED
from clantune_scale.bench.schedules.oracle import (
    Choice,
    NoOracleError,
    Oracle,
    cache_folder,
    fixed_losses,
    fixed_runs,
    oracle_of,
    oracle_runs,
    search,
)
from clantune_scale.bench.schedules.problem import Grid, Start, quarter_decades
from clantune_scale.bench.schedules.problems.quadratic import Quadratic
from clantune_scale.errors import ConfigError
from tests.bench.schedules.tiny_problem import CURVATURE, TINY


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_point_of_the_grid_is_a_plain_run():
    point, seed = Choice(0.3, "linear", 0.0), 5
    theta = torch.ones(8)
    for step in range(40):
        gradient = CURVATURE * (theta - TINY.batch(seed, step, 0)[0].mean(dim=0))
        theta = theta - 0.3 * (1 - step / 40) * gradient
    expected = float(0.5 * (theta.square() * CURVATURE).sum())
    assert fixed_losses(TINY, [point], [seed]) == [pytest.approx(expected, rel=1e-4)]  # float32 through 40 steps


def test_the_oracle_is_the_best_point_and_beats_every_other(cache):
    oracle = search(TINY)
    assert len(oracle.grid) == 10
    assert oracle.loss == pytest.approx(min(loss for *_, loss in oracle.grid))
    assert (oracle.best.rate, oracle.best.schedule, oracle.best.weight_decay, oracle.loss) in oracle.grid
    assert math.isinf(oracle.grid[-2][3]) or oracle.grid[-2][3] > oracle.initial_loss  # 3 is beyond the edge
    assert oracle.constant_losses == tuple(loss for _, schedule, _, loss in oracle.grid if schedule == "constant")
    assert oracle.losses_by_share[0.5] > oracle.loss


def test_rates_around_the_best_constant_one_are_enough_if_the_best_lies_inside(cache):
    wide = TINY.variant("wide", grid=Grid(quarter_decades(-3.0, 17), TINY.grid.schedules, reach=(1, 1)))
    exhaustive = search(wide.variant("all", grid=replace(wide.grid, reach=None)))
    found = search(wide)
    assert (found.best, found.loss, found.constant_rate) == (exhaustive.best, exhaustive.loss, exhaustive.constant_rate)
    searched = sorted({rate for rate, *_ in found.grid})
    assert len(searched) < 10 and searched[0] < found.best.rate < searched[-1]
    assert set(found.grid) <= set(exhaustive.grid)


def test_starts_are_counted_from_the_best_constant_rate_the_tuned_peak_or_the_oracle(cache):
    problem = TINY.variant("scheduled", schedule="linear")
    oracle = search(problem)
    along = oracle.losses_along("linear", 0.0)
    peak = min(along, key=along.__getitem__)
    half = Start("half", 0.5, anchor="tuned")
    assert oracle.start_rate(half, problem) == 0.5 * peak
    assert oracle.start_rate(Start("0.1x", 0.1), problem) == 0.1 * oracle.constant_rate
    assert oracle.start_rate(Start("oracle", anchor="oracle"), problem) == oracle.best.rate
    (own,) = settled(problem.variant("x", starts=(Start("oracle", anchor="oracle"),)), oracle).starts
    assert (own.schedule, own.changes) == (oracle.best.schedule, {"weight_decay": oracle.best.weight_decay})
    with pytest.raises(ConfigError, match="best peak of 'wsd', which is not in the grid"):
        oracle.start_rate(half, problem.variant("other", schedule="wsd"))


def test_without_progress_there_is_nothing_to_measure(cache):
    stuck = replace(search(TINY), initial_loss=1e-4, loss=1e-4)
    with pytest.raises(NoOracleError, match="goes from 0.0001 to 0.0001 only"):
        oracle_runs(TINY, stuck, (0, 1))
    result = run([TINY, TINY.variant("stuck", init=lambda seed: [torch.zeros(8)])], [FIXED], seeds=(0, 1), say=print)
    assert len(result.references) == 1 and "'stuck'" in result.left_out[0]
    assert "Left out: the oracle of 'stuck'" in result.to_markdown()


def test_a_best_point_that_blows_up_on_other_seeds_gives_way_to_the_next(cache):
    found = search(TINY)
    seeds = (0, 1)
    assert oracle_runs(TINY, found, seeds) == fixed_runs(TINY, [found.best], seeds)[0]
    beyond = (3.0, "constant", 0.0, 0.9 * found.loss)
    lucky = replace(found, best=Choice(*beyond[:3]), loss=beyond[3], grid=(*found.grid, beyond))
    assert oracle_runs(TINY, lucky, seeds) == oracle_runs(TINY, found, seeds)
    with pytest.raises(ConfigError, match="none of the 1 best points of 'tiny'"):
        oracle_runs(TINY, replace(lucky, grid=(beyond,)), seeds)


def test_it_is_computed_once_and_kept_with_its_grid(cache, monkeypatch):
    with pytest.raises(ConfigError, match="has no oracle yet"):
        oracle_of(TINY, computes=False)
    oracle = oracle_of(TINY)
    assert oracle_of(TINY, computes=False) == oracle
    (path,) = cache_folder().iterdir()
    assert path.is_relative_to(cache)
    record = json.loads(path.read_text())
    assert len(record["grid"]) == 10
    assert Oracle.from_json(record) == oracle


def test_the_package_brings_oracles_so_that_others_need_not_compute_them(cache):
    bundled = list((resources.files("clantune_scale.bench.schedules") / "oracles").iterdir())
    assert sum(len(path.read_bytes()) for path in bundled) < 200_000
    oracles = [Oracle.from_json(json.loads(path.read_text())) for path in bundled]
    assert "digits-mlp-adamw" in {oracle.problem for oracle in oracles}
    assert all(oracle.loss == min(loss for *_, loss in oracle.grid) for oracle in oracles)
    assert oracle_of(Quadratic(), computes=False).problem == "quadratic-sgd"


def test_problems_share_an_oracle_if_only_their_starts_differ():
    other_starts = TINY.variant("wrong", starts=(Start("5x", 5.0),), extra_genes=("weight_decay",))
    assert other_starts.fingerprint() == TINY.fingerprint()
    assert TINY.variant("longer", total_steps=60).fingerprint() != TINY.fingerprint()
    assert TINY.variant("other data", test=[torch.ones(4, 8)]).fingerprint() != TINY.fingerprint()
    with pytest.raises(AttributeError, match="no attribute 'total_step' to vary"):
        TINY.variant("typo", total_step=60)


def test_a_start_that_would_not_train_is_lowered_to_one_that_does():
    losses = (0.5, 0.2, 0.4, math.inf)
    oracle = Oracle("x", Choice(0.3, "linear", 0.0), 0.1, 1.0, 0.1, losses, {}, ())
    rates = (0.03, 0.1, 0.3, 1.0)
    assert oracle.trained_rate(10.0, rates) == 0.3
    assert oracle.trained_rate(3.0, rates) == 0.3
    assert oracle.trained_rate(2.0, rates) == pytest.approx(0.2)  # between rates that train
    assert oracle.trained_rate(0.01, rates) == pytest.approx(0.001)
