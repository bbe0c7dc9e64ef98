"""What a user imports: the names of the package, their types, and the modules that they come from."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import clantune_scale
from clantune_scale import errors

REPOSITORY = Path(clantune_scale.__file__).parents[1]
FRONT_DOORS = ("attach", "attach_megatron", "initialize", "join", "load_config")

# Engines warn while they are imported; that is not this package's to mend.
of_engines = pytest.mark.filterwarnings("ignore")

SNIPPET = """
import clantune_scale
from clantune_scale import ClanConfig, Summary
from clantune_scale.strategies import Decision, Fitness, Population, RoundPlan, Strategy

reveal_type(clantune_scale.join)
reveal_type(clantune_scale.attach)
reveal_type(clantune_scale.attach_megatron)
reveal_type(clantune_scale.initialize)
reveal_type(clantune_scale.MembersLostError())
reveal_type(Summary(None, 0.0).champion_loss)
clantune_scale.join(ClanConfig(population_size=2), timeout="soon")
"""


@of_engines
def test_every_public_name_is_there_and_listed():
    assert set(clantune_scale.__all__) <= set(dir(clantune_scale))
    for name in clantune_scale.__all__:
        assert getattr(clantune_scale, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        _ = clantune_scale.atach


def test_every_exception_of_the_package_lives_in_errors_and_is_exported():
    own = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, (Exception, Warning))
    }
    assert own <= set(clantune_scale.__all__)
    elsewhere = []
    for path in sorted((REPOSITORY / "clantune_scale").rglob("*.py")):
        # The fault injector's own error is thrown at the package, not by it.
        if path.name == "errors.py" or "bench" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            bases = node.bases if isinstance(node, ast.ClassDef) else []
            if {ast.unparse(base).split(".")[-1] for base in bases} & (own | {"Exception", "RuntimeError"}):
                elsewhere.append(f"{path.name}: {node.name}")
    assert not elsewhere


def test_py_typed_is_in_the_wheel():
    """Without the file in an installed package, a type checker takes all of it for Any."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["package-data"]["clantune_scale"] == ["py.typed"]


def test_the_imports_for_type_checkers_are_those_of_run_time():
    tree = ast.parse(Path(clantune_scale.__file__).read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert typed == clantune_scale._LAZY


@pytest.mark.timeout(400)
def test_a_type_checker_sees_the_types(tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "snippet.py"]
    # The installed package is found by its py.typed; a source tree by its path.
    environment = os.environ | {"MYPYPATH": str(REPOSITORY)}
    settings = ["--follow-imports=silent", "--ignore-missing-imports"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, cwd=tmp_path, env=environment)
    said = done.stdout
    assert (REPOSITORY / "clantune_scale" / "py.typed").is_file()
    assert "timeout: builtins.str" not in said and 'Unexpected keyword argument "timeout" for "join"' in said, said
    revealed = [line.partition('Revealed type is "')[2] for line in said.splitlines() if "Revealed" in line]
    assert len(revealed) == 6 and not any(text.startswith("Any") for text in revealed), said
    expected = ("ClanWorld", "LoopClan", "MegatronClan", "tuple[Any, Any, Any, Any]", "MembersLostError", "float")
    for text, part in zip(revealed, expected, strict=True):
        assert part in text
    assert "Found 1 error" in said, said


@of_engines
@pytest.mark.parametrize("name", FRONT_DOORS)
def test_a_front_door_shows_and_documents_each_argument(name):
    function = getattr(clantune_scale, name)
    documentation = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.kind is not inspect.Parameter.VAR_KEYWORD
        assert parameter.name in documentation
    assert "{arguments}" not in documentation


@of_engines
@pytest.mark.parametrize("name", ["attach", "attach_megatron", "initialize"])
def test_a_front_door_refuses_a_misspelt_keyword_at_once(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'evalute'"):
        getattr(clantune_scale, name)(None, None, config={}, evalute=None, eval_data=None, forward_step=0, seq_length=1)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch").glob("*.py")), ids=lambda path: path.name)
def test_the_scripts_import_the_package_and_nothing_below_it(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        # Frameworks have a module each, which asks for its extra when it is imported.
        own = [name for name in names if name.startswith("clantune_scale.")]
        assert not [name for name in own if not name.startswith("clantune_scale.integrations.")]
