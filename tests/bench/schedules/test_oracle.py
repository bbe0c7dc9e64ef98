from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import resources

import pytest
import torch

from clantune_scale.bench.schedules.oracle import (
    Choice,
    Oracle,
    cache_folder,
    fixed_losses,
    fixed_runs,
    oracle_of,
    oracle_runs,
    search,
)
from clantune_scale.bench.schedules.problem import Start
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
    assert oracle.trained_rate(0.01, rates) == pytest.approx(0.001)
