"""The layers: who may import what, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clantune_scale

PACKAGE = Path(clantune_scale.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

# module -> the places (relative to the package) that may import it
ALLOWED = {
    "deepspeed": ("backends/deepspeed/", "run.py", "bench/"),
    "megatron": ("backends/",),
    "mlflow": ("tracking/", "bench/"),
    "matplotlib": ("tracking/", "bench/"),
    "pydantic": ("config", "ds_config.py", "tracking/events.py"),
}
PURE = ("torch", "pydantic", "deepspeed", "mlflow", "matplotlib", "safetensors")


def _imports(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, at its head or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_an_engine_is_imported_only_where_it_belongs(path):
    place = str(path.relative_to(PACKAGE))
    for module in _imports(path) & ALLOWED.keys():
        assert place.startswith(ALLOWED[module]), f"{place} imports {module}"


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "core").rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_the_core_is_pure(path):
    assert not _imports(path) & set(PURE)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("clantune_scale"):
            below = ("clantune_scale.core", "clantune_scale.errors", "clantune_scale.core.spelling")
            assert node.module.startswith(below), f"{path} imports {node.module}"


def test_importing_the_package_and_its_core_loads_no_engine():
    modules = (
        "clantune_scale, clantune_scale.core.strategies, clantune_scale.core.schedule, clantune_scale.config.schema"
    )
    heavy = "'torch', 'deepspeed', 'mlflow', 'matplotlib'"
    script = f"import {modules}, sys; print(*[m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.split() == []
