from __future__ import annotations

import pytest

from clantune_scale.bench.schedules import ceiling
from clantune_scale.bench.schedules.benchmark import run
from clantune_scale.bench.schedules.methods import FIXED
from clantune_scale.bench.schedules.oracle import oracle_of
from clantune_scale.bench.schedules.problem import Start
from tests.bench.schedules.tiny_problem import TINY

SEEDS = (0, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_one_right_rate_is_at_least_as_good_as_every_rate_that_is_tried():
    found = ceiling.ceilings(TINY, SEEDS)
    assert found[0].rate == found[1].rate  # the starts differ in nothing else
    assert {one.schedule for one in found} <= {"constant", "warmup-linear"}
    oracle = oracle_of(TINY)
    for octaves in (-2, 0, 1):
        rate = oracle.best.rate * 2**octaves
        same = TINY.variant("same", starts=(*TINY.starts, Start("own", rate / oracle.constant_rate)))
        fixed = run([same], [FIXED], seeds=SEEDS, say=lambda line: None)
        losses = fixed.references[0].default_losses
        assert found[0].s1 >= fixed.references[0].s1(0, losses[2]) - 1e-9


def test_what_a_start_has_besides_its_rate_stays():
    # Gradients clipped to next to nothing: no rate that is tried makes up for that.
    wrong = TINY.variant("wrong", starts=(Start("1x"), Start("1x, decayed", changes={"clip": 1e-3})))
    free, held = ceiling.ceilings(wrong, SEEDS)
    assert free.s1 > held.s1 + 0.1


def test_the_command_prints_a_line_for_a_problem_and_refuses_what_there_is_not(capsys):
    assert ceiling.main(["--problems", "tests.bench.schedules.tiny_problem:TINY"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("tiny: 0.1x ") and "; 10x " in line and " from " in line
    assert ceiling.main(["--problems", "tinny"]) == 2
    assert "no problem is called 'tinny'" in capsys.readouterr().err
