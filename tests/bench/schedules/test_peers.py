"""Peers by name, and what is said where their packages are missing; none of them is needed here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import clantune_scale
from clantune_scale.bench.schedules.__main__ import main
from clantune_scale.bench.schedules.methods import FIXED, POPULATION_PEERS, named
from clantune_scale.bench.schedules.peers.optimizers import OPTIMIZER_PEERS
from clantune_scale.bench.schedules.trial import run_trial
from clantune_scale.core.strategies import build
from clantune_scale.errors import ConfigError
from tests.bench.schedules.tiny_problem import TINY

ROOT = Path(clantune_scale.__file__).parents[1]
PACKAGES = ("schedulefree", "prodigyopt", "dadaptation", "ray", "ray.tune.schedulers", "ray.tune.experiment")


@pytest.fixture
def without_peers(monkeypatch):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("name", [*(OPTIMIZER_PEERS.keys() - {"torch"}), *POPULATION_PEERS])
def test_a_missing_package_is_named_with_the_extra_that_has_it(name, without_peers):
    with pytest.raises(ConfigError, match=rf"'{name}' needs \w+, .*pip install 'clantune-scale\[peers\]'"):
        named([name], 4)


def test_a_missing_package_is_named_by_the_strategy_too(without_peers):
    facts = FIXED.build(TINY, TINY.settings, 0).facts
    for peer in ("ray-pbt", "ray-pb2"):
        with pytest.raises(ConfigError, match=rf"'{peer}' needs ray, .*clantune-scale\[peers\]"):
            build(POPULATION_PEERS[peer].strategy, facts)


def test_the_command_says_so_before_anything_runs(without_peers, capsys):
    assert main(["--problems", "tests.bench.schedules.tiny_problem:TINY", "--methods", "fixed", "prodigy"]) == 2
    captured = capsys.readouterr()
    assert "clantune-scale[peers]" in captured.err and captured.out == ""


def test_what_needs_no_package_runs_without(without_peers):
    methods = named(["fixed", "warmup-cosine", "torch", "pbt"], 4)
    assert [run_trial(method, TINY, rates=[0.1, 0.3], seeds=(0,)).method for method in methods] == [
        "fixed",
        "warmup-cosine",
        "torch",
        "pbt P=4",
    ]


def test_the_benchmark_imports_no_peer():
    script = "import clantune_scale.bench.schedules.__main__, sys; print(*[m for m in {} if m in sys.modules])"
    command = [sys.executable, "-c", script.format(PACKAGES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_warmup_cosine_has_the_starts_rate_under_that_curve():
    (method,) = named(["warmup-cosine"], 4)
    trial = run_trial(method, TINY, rates=[0.1, 0.3], seeds=(0,))
    scheduled = TINY.variant("scheduled", schedule="warmup-cosine")
    assert trial.losses == run_trial(FIXED, scheduled, rates=[0.1, 0.3], seeds=(0,)).losses
    assert trial.runs[0][0].cost == 1.0


def test_populations_have_the_size_that_was_asked_for():
    pytest.importorskip("ray.tune.schedulers", reason="the extra 'peers' is not installed")
    (method,) = named(["ray-pbt"], 4)
    assert (method.name, method.population_size) == ("ray-pbt P=4", 4)
