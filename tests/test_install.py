"""What an installation holds, and what a run does where an extra's package is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import clantune_scale
from clantune_scale.config.schema import TrackingConfig
from clantune_scale.core.extras import EXTRAS
from clantune_scale.errors import ClanError
from clantune_scale.tracking import Tracking
from tests.ranks import free_port

ROOT = Path(__file__).parents[1]
PACKAGE = Path(clantune_scale.__file__).parent
INTEGRATIONS = "clantune_scale.integrations"
OPTIONAL = ("deepspeed", "megatron", "mlflow", "matplotlib", "argcomplete", "sklearn", "transformers", "accelerate")


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def test_the_wheel_has_the_package_and_its_mark_and_no_benchmark(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    source.mkdir()
    # A build leaves its folders beside the sources: those of this checkout stay as they are.
    for name in ("pyproject.toml", "README.md", "LICENSE", "clantune_scale"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("clantune_scale/")}
    sources = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if "bench" not in path.parts}
    assert {name for name in held if name.endswith(".py")} == sources
    assert held - sources <= {"clantune_scale/py.typed"}


def test_the_extras_that_errors_name_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, (_, extra) in EXTRAS.items():
        distribution = package.replace(".", "-")
        assert any(requirement.startswith(distribution) for requirement in extras[extra]), package
    for extra in ("deepspeed", "megatron", "mlflow", "report"):
        assert extra in extras["all"][0]


@pytest.mark.parametrize(
    ("hidden", "use", "says"),
    [
        ("deepspeed", "clantune_scale.initialize(model=None)", "clantune_scale.initialize() needs DeepSpeed"),
        ("deepspeed", "clantune_scale.run.main(['train.py'])", "clantune_scale.run needs DeepSpeed"),
        ("megatron", "clantune_scale.attach_megatron(None)", "clantune_scale.attach_megatron() needs Megatron-core"),
        (
            "lightning",
            "import clantune_scale.integrations.lightning",
            f"{INTEGRATIONS}.lightning needs Lightning",
        ),
        (
            "transformers",
            "import clantune_scale.integrations.transformers",
            f"{INTEGRATIONS}.transformers needs transformers",
        ),
        ("accelerate", "import clantune_scale.integrations.accelerate", f"{INTEGRATIONS}.accelerate needs Accelerate"),
    ],
    ids=["initialize", "run", "attach_megatron", "lightning", "transformers", "accelerate"],
)
def test_an_engine_that_is_missing_is_named_with_its_extra(hidden, use, says):
    script = f"""
import sys
sys.modules[{hidden!r}] = None
import clantune_scale, clantune_scale.run
try:
    {use}
except clantune_scale.ClanError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], env=_environment(), capture_output=True, text=True)
    assert done.stdout.strip() == f"{says}, which is not installed. Run `pip install 'clantune-scale[{hidden}]'`.", (
        done.stderr
    )


def test_a_star_import_needs_no_extra(tmp_path):
    script = tmp_path / "star.py"
    script.write_text(
        "from clantune_scale import *\n"
        "import clantune_scale\n"
        "assert set(clantune_scale.__all__) <= globals().keys()\n"
        "for start in (initialize, attach_megatron):\n"
        "    try:\n"
        "        start()\n"
        "    except ClanError as error:\n"
        "        print(error)\n"
    )
    command = [sys.executable, "-m", "tests.hidden_packages", ",".join(OPTIONAL), str(script)]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.rpartition(" ")[2] for line in done.stdout.splitlines()] == [
        "'clantune-scale[deepspeed]'`.",
        "'clantune-scale[megatron]'`.",
    ]


def _tracked(tmp_path: Path, *, is_writer: bool = True, **settings: Any) -> None:
    Tracking.open(TrackingConfig(**settings), run_dir=tmp_path, is_writer=is_writer).close()


@pytest.mark.parametrize(
    "asked", [{"mlflow": True}, {"tracking_uri": "sqlite:///runs.db"}], ids=lambda asked: str(asked)
)
@pytest.mark.parametrize("is_writer", [True, False])
def test_mlflow_that_is_asked_for_and_missing_is_refused_on_every_rank(asked, is_writer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ClanError, match=rf"tracking.{next(iter(asked))}\" needs MLflow.*clantune-scale\[mlflow\]"):
        _tracked(tmp_path, is_writer=is_writer, **asked)
    assert not (tmp_path / "events.jsonl").exists()


def test_mlflow_that_only_the_default_asks_for_is_done_without_and_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    _tracked(tmp_path)
    _tracked(tmp_path, is_writer=False)
    (said,) = caplog.messages
    assert "clantune-scale[mlflow]" in said and (tmp_path / "events.jsonl").exists()


def test_a_run_that_wants_no_mlflow_hears_nothing_of_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    _tracked(tmp_path, mlflow=False)
    assert not caplog.messages


def test_a_report_that_misses_matplotlib_names_its_extra(call, finished_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = call("report", str(finished_run.folder))
    assert said.code == 2 and "the report needs matplotlib" in said.err and "clantune-scale[report]" in said.err


def test_a_later_upload_that_misses_mlflow_names_its_extra(finished_run, monkeypatch, capsys):
    from clantune_scale.tracking.mlflow import main

    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert main([str(finished_run.folder)]) == 1
    assert "clantune-scale[mlflow]" in capsys.readouterr().err


def test_an_fsdp_script_trains_without_any_extra(tmp_path):
    command = [sys.executable, "-m", "tests.hidden_packages", ",".join(OPTIONAL), "tests/fsdp_script.py", str(tmp_path)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    events = [json.loads(line) for line in (tmp_path / "mine" / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events].count("round_end") == 3
    assert events[-1]["status"] == "FINISHED" and events[-1]["step"] == 12
    assert {path.name for path in (tmp_path / "mine").iterdir()} >= {"champion.safetensors", "schedule.json"}
    assert not (tmp_path / "mine" / "genes.png").exists()
    notices = said[0][1]
    assert notices.count("clantune-scale[mlflow]") == notices.count("clantune-scale[report]") == 1, notices
    assert "clantune-scale[" not in said[1][1]
