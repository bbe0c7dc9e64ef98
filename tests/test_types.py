"""The types: mypy over the package, as pyproject.toml sets it up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


# Half a minute; torch's own types are most of it.
@pytest.mark.timeout(400)
def test_mypy_finds_nothing(tmp_path):
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "--no-error-summary"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"


def test_the_core_and_what_users_import_are_strict(tmp_path):
    """A definition without types is an error there and nowhere else."""
    config = REPOSITORY / "pyproject.toml"
    for module, is_strict in (
        ("clantune_scale", True),
        ("clantune_scale.core.extra", True),
        ("clantune_scale.config.extra", True),
        ("clantune_scale.strategies", True),
        ("clantune_scale.errors", True),
        ("clantune_scale.tracking.extra", False),
    ):
        # As a package of that name in an empty folder, so that nothing else is read.
        source = tmp_path / module / Path(*module.split("."))
        source.mkdir(parents=True)
        (source / "__init__.py").write_text("def untyped(x):\n    return x\n")
        command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path / "cache")]
        done = subprocess.run(
            [*command, "--namespace-packages", "--package", module], capture_output=True, text=True,
            cwd=tmp_path / module, env={"PATH": "", "MYPYPATH": str(tmp_path / module)},
        )  # fmt: skip
        assert ("no-untyped-def" in done.stdout) is is_strict, (module, done.stdout, done.stderr)
