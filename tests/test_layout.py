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
    "lightning": ("integrations/",),
    "torchmetrics": ("integrations/",),
    "torchtitan": ("integrations/",),
    "mlflow": ("tracking/", "bench/"),
    "matplotlib": ("tracking/", "bench/"),
    "transformers": ("integrations/",),
    "accelerate": ("integrations/",),
    "pydantic": ("config/", "tracking/events.py"),
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


def _arrows() -> dict[str, set[str]]:
    """Module to the modules of this package that it imports: at its head, under TYPE_CHECKING and in functions."""
    names = {}
    for path in FILES:
        parts = ("clantune_scale", *path.relative_to(PACKAGE).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    arrows: dict[str, set[str]] = {}
    for name, path in names.items():
        arrows[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                arrows[name].update(alias.name for alias in node.names if alias.name in names)
            elif isinstance(node, ast.ImportFrom) and node.module in names:
                # `from package import module` is an arrow to the module, `from module import name` to the module.
                found = (f"{node.module}.{alias.name}" for alias in node.names)
                arrows[name].update(full if full in names else node.module for full in found)
        arrows[name].discard(name)
    return arrows


def _circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(arrows[name]):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            begin = stack.index(name)
            component = stack[begin:]
            del stack[begin:]
            if len(component) > 1:
                circles.append(sorted(component))

    for name in sorted(arrows):
        if name not in order:
            visit(name)
    return circles


def test_a_circle_of_imports_is_found():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert _circles(arrows) == [["b", "c"]]


def test_no_files_import_each_other_in_a_circle():
    arrows = _arrows()
    assert "clantune_scale.checkpoint.durable" in arrows["clantune_scale.runtime.built_clan"]
    assert _circles(arrows) == []


def test_no_folders_import_each_other_in_a_circle():
    arrows: dict[str, set[str]] = {}
    for module, targets in _arrows().items():
        own, *others = (_folder(name) for name in (module, *targets))
        arrows.setdefault(own, set()).update(set(others) - {own})
    assert {"runtime", "checkpoint", "errors"} <= arrows.keys()
    assert _circles(arrows) == []


def _folder(module: str) -> str:
    """A module's folder below the package; a loose module's own name."""
    return module.partition(".")[2].partition(".")[0] or "the package"


def test_only_the_ways_of_attaching_know_the_whole_clan():
    """Its parts take a view, the run's progress or plain arguments: none reaches into the clan."""
    allowed = ("runtime.attach", "backends.", "bench.faults.", "integrations.")
    for module, targets in _arrows().items():
        if "clantune_scale.runtime.clan" in targets:
            assert module.removeprefix("clantune_scale.").startswith(allowed), f"{module} imports the clan"


def test_a_config_does_not_climb_to_what_uses_it():
    for module, targets in _arrows().items():
        if module.startswith("clantune_scale.config"):
            up = [t for t in targets if not t.startswith(("clantune_scale.config", "clantune_scale.core"))]
            assert set(up) <= {"clantune_scale.errors"}, f"{module} imports {up}"


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "config").rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_config_talks_to_no_other_process(path):
    assert not _imports(path) & {"torch"}
