"""Draws are pure functions of their seed, and the reporting side is held back."""

from __future__ import annotations

import hashlib
import json
import statistics

import pytest

from clantune_scale.bench.schedules import ceiling, reports
from clantune_scale.bench.schedules.__main__ import main
from clantune_scale.bench.schedules.benchmark import REPORTING_SEEDS, run
from clantune_scale.bench.schedules.families import split
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.generator import Families, _length, draw_problem, draw_problems
from clantune_scale.bench.schedules.families.registry import OPTIMIZER_FAMILIES, SCHEDULES, TASKS, TaskFamily
from clantune_scale.bench.schedules.methods import FIXED
from clantune_scale.bench.schedules.suite import load
from clantune_scale.errors import ConfigError
from tests.bench.schedules import plugin_families
from tests.bench.schedules.tiny_problem import TINY

PLUGINS = "tests.bench.schedules.plugin_families"
NAMED = ["--tasks", "test bowl", "--optimizers", "test steady", "--schedules", "test stairs"]


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reports, "LOG", tmp_path / "REPORTS.log")


def built_in(registry, side):
    return [name for name in split.names_on(side, registry) if not name.startswith("test ")]


def families(side: str) -> Families:
    return Families(side, *(built_in(registry, side) for registry in (TASKS, OPTIMIZER_FAMILIES, SCHEDULES)))


def facts(problem) -> str:
    starts = [(start.name, start.rate, sorted(start.changes), start.anchor, start.kind) for start in problem.starts]
    settings = (problem.settings.optimizer, sorted(problem.settings.base().items()))
    return repr((problem.name, problem.total_steps, problem.batch_size, settings, problem.grid, starts))


def test_a_draw_is_a_pure_function_of_its_seed_and_place():
    pytest.importorskip("sklearn", reason="the suite's family has digits")
    problems = draw_problems(families("tuning"), count=12, seed=0)
    alone = draw_problem(families("tuning"), seed=0, index=7)
    assert facts(alone) == facts(problems[7]) and alone.fingerprint() == problems[7].fingerprint()
    assert len({problem.name for problem in problems}) == 12
    assert facts(draw_problem(families("tuning"), seed=1, index=7)) != facts(problems[7])
    said = "\n".join(map(facts, problems))
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "97a728976db67925"


def test_families_take_turns_and_short_runs_are_frequent():
    tuning = families("tuning")
    count = len(tuning.optimizers)
    names = [draw_problem(tuning, seed=3, index=index).name.split("; ")[1] for index in range(2 * count)]
    assert sorted(names[:count]) == sorted(names[count:]) == sorted(tuning.optimizers)
    lengths = [_length(TaskFamily("test", plugin_families.Bowl), Draw("length", i)) for i in range(400)]
    assert min(lengths) >= 300 and max(lengths) <= 5000 and max(lengths) > 4000
    assert 500 < statistics.median(lengths) < 1000


def test_starts_are_wild_tuned_the_oracles_and_wrong():
    plugged = Families.of(report=False, tasks=["test bowl"], optimizers=["test steady"], schedules=["test stairs"])
    problem = draw_problem(plugged, seed=0, index=0)
    kinds = [start.kind for start in problem.starts]
    assert kinds == ["wild"] * 4 + ["tuned"] * 3 + ["oracle", "wrong decay", "wrong momentum"]
    assert all(0.01 <= start.rate <= 10 for start in problem.starts[:4])
    assert problem.schedule in problem.grid.schedules and problem.settings.weight_decay in problem.grid.weight_decays


def test_the_two_sides_of_the_split_draw_from_families_apart():
    for registry in split.REGISTRIES:
        both = [set(built_in(registry, side)) for side in ("tuning", "reporting")]
        assert both[0] and both[1] and not both[0] & both[1]
    names = [draw_problems(families(side), count=3, seed=0) for side in ("tuning", "reporting")]
    assert [problem.is_reporting for side in names for problem in side] == [False] * 3 + [True] * 3


def test_what_is_held_back_is_refused_without_a_report(capsys, tmp_path):
    held_back = built_in(TASKS, "reporting")[0]
    with pytest.raises(ConfigError, match=f"{held_back!r} is on the reporting side.*Add --report"):
        Families.of(report=False, tasks=[held_back])
    with pytest.raises(ConfigError, match="'suite' is on the tuning side.*Leave --report away"):
        Families.of(report=True, tasks=["suite"])
    secret = TINY.variant("secret", is_reporting=True)
    with pytest.raises(ConfigError, match="'secret' is on the reporting side"):
        run([TINY, secret], [FIXED], seeds=(0, 1), say=lambda line: None)
    with pytest.raises(ConfigError, match="'secret' is on the reporting side"):
        ceiling.ceilings(secret, (0, 1))
    assert main(["--problems", "generated", "--tasks", held_back, "--out", str(tmp_path / "out")]) == 2
    assert "Add --report" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="only python -m clantune_scale.bench.schedules draws"):
        load(["generated"])
    assert run([secret], [FIXED], seeds=REPORTING_SEEDS, say=lambda line: None).is_report


def test_a_tiny_draw_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--problems", "generated", "--draw", "2", "--draw-seed", "4", "--plugins", PLUGINS, *NAMED]
    command += ["--methods", "fixed", "clan", "--population", "4", "--out", str(out)]
    assert main([*command, "--figures"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("[1/2, 0 s] tuning 4/0: test bowl; test steady; test stairs (")
    record = json.loads((out / "table.json").read_text())
    assert not record["is_report"] and len(record["figures"]["clan P=4"]) == 20
    kinds = {own["kind"] for own in record["figures"]["clan P=4"]}
    assert kinds == {"wild", "tuned", "oracle", "wrong decay", "wrong momentum"}
    # The oracle's own configuration misses what the oracle misses: nothing.
    shares = [own["configured"] for own in record["figures"]["fixed"] if own["kind"] == "oracle"]
    assert [share for seeds in shares for share in seeds] == pytest.approx([0.0] * 6, abs=1e-6)
    assert all(own["reached"] == [1.0] * 3 for own in record["figures"]["fixed"])
    assert (out / "missing.png").read_bytes().startswith(b"\x89PNG")
    files = sorted((out / "runs").iterdir())
    times = [path.stat().st_mtime_ns for path in files]
    assert main([*command, "--resume"]) == 0
    again = json.loads((out / "table.json").read_text())
    assert [path.stat().st_mtime_ns for path in files] == times  # nothing ran again
    assert again == record
    assert main(["--show", str(out)]) == 0
    assert "| wrong decay | clan P=4 |" in capsys.readouterr().out


def test_a_report_is_logged_and_shown_only_as_one(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    command = ["--problems", "tests.bench.schedules.tiny_problem:TINY", "--methods", "fixed"]
    assert main([*command, *out]) == 0
    assert not reports.LOG.exists()
    assert main([*command, *out, "--report"]) == 0
    date, commit, *rest = reports.LOG.read_text().split()
    assert len(date) == 10 and commit
    assert " ".join(rest) == f"python -m clantune_scale.bench.schedules {' '.join(command)} --report"
    assert main(["--show", out[1]]) == 2
    assert "is a report. Add --report" in capsys.readouterr().err
    assert main(["--show", out[1], "--report"]) == 0
    assert main(["--show", str(tmp_path)]) == 2


def test_all_families_are_listed_with_their_side(capsys):
    assert main(["--list-families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tuning     task/suite" in lines and len(lines) >= 53
