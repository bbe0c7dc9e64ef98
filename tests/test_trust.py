"""What could run code that it reads, or show what is secret, is written here by name and place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import clantune_scale

PACKAGE = Path(clantune_scale.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# Collectives that send pickles; readers of DCP folders, whose `.metadata` is one.
NAMES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "FileSystemReader",
    "load_checkpoint",
    "exec",
    "eval",
    "weights_only=False",
    "allow_pickle=True",
}

ALLOWED = {
    # It hooks the call by which the user's own script loads a checkpoint, and reads nothing.
    "backends/deepspeed/engine.py": {"load_checkpoint"},
    # `.metadata` after its digest was compared with what the donor said over the column.
    "transfer/dcp_files.py": {"pickle", "FileSystemReader"},
    # A round's folder after every file was compared with the round's manifest.
    "checkpoint/shards.py": {"FileSystemReader"},
}


def suspicious(source: str) -> set[str]:
    """Names in a module's source that stand for reading pickles or running text."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").partition(".")[0]} & MODULES
            found |= {alias.name for alias in node.names} & NAMES
        elif isinstance(node, ast.Attribute):
            found |= {node.attr} & (NAMES - {"exec", "eval"})
        elif isinstance(node, ast.Name):
            found |= {node.id} & NAMES
        elif isinstance(node, ast.Call):
            found |= _of_a_call(node)
    return found


def _of_a_call(node: ast.Call) -> set[str]:
    said = {
        f"{keyword.arg}={keyword.value.value}" for keyword in node.keywords if isinstance(keyword.value, ast.Constant)
    }
    found = said & NAMES
    is_torch_load = ast.unparse(node.func) == "torch.load"
    return found | ({"torch.load"} if is_torch_load and "weights_only=True" not in said else set())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_reads_a_pickle_but_what_is_listed(path):
    allowed = ALLOWED.get(str(path.relative_to(PACKAGE)), set())
    assert suspicious(path.read_text(encoding="utf-8")) <= allowed


def test_the_list_has_no_entry_that_is_not_needed():
    for place, names in ALLOWED.items():
        assert names == suspicious((PACKAGE / place).read_text(encoding="utf-8")) & names


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", {"pickle"}),
        ("from pickle import loads", {"pickle"}),
        ("import torch\ntorch.load(f)", {"torch.load"}),
        ("import torch\ntorch.load(f, weights_only=False)", {"torch.load", "weights_only=False"}),
        ("import torch\ntorch.load(f, weights_only=True)", set()),
        ("dist.all_gather_object(x, y)", {"all_gather_object"}),
        ("from torch.distributed import broadcast_object_list", {"broadcast_object_list"}),
        ("numpy.load(f, allow_pickle=True)", {"allow_pickle=True"}),
        ("engine.eval()", set()),
        ("eval(text)", {"eval"}),
    ],
)
def test_what_is_looked_for_is_found(source, found):
    assert suspicious(source) == found
