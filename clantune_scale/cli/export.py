"""``clantune export``: the champion's weights, checked, as safetensors or a PyTorch state dict."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clantune_scale.cli.command import Answer, Command
from clantune_scale.cli.opened_run import OpenedRun, add_run_argument, open_run
from clantune_scale.errors import ClanError
from clantune_scale.tracking.history import end_of


def champion_file(run: OpenedRun) -> Path:
    """The champion's weights in a run's folder.

    Raises:
        ClanError: if the run goes on, kept no weights, or its file is gone.
    """
    path = run.folder / "champion.safetensors"
    if path.is_file():
        return path
    end = end_of(run.events)
    if end is None:
        raise ClanError(f"{run.folder.name} goes on or was cut off: weights are written at the end. Wait for it.")
    written = end.get("artifacts", {}).get("champion")
    if written is None:
        raise ClanError(
            f"{run.folder.name} kept no weights ({end['status']}, champion {end.get('champion')}). "
            f"Set clantune.checkpoint.champion to true for the next one."
        )
    raise ClanError(f"{path} is gone; the run wrote it as {written} on its host. Copy it from there.")


def read_weights(path: Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    """All tensors of a safetensors file (which checks that they fill it exactly), and its metadata.

    Raises:
        ClanError: if the file is damaged, or a weight in it is not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ClanError(f"{path} is damaged: {error}. Copy it again from the run's host.") from error
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ClanError(f"{path} has weights that are not finite: {', '.join(broken[:3])}. Do not use them.")
    return tensors, metadata


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--to", metavar="FOLDER", default=".", help="where to put it (default: here)")
    parser.add_argument("--format", choices=("safetensors", "pytorch"), default="safetensors")


def _run(arguments: argparse.Namespace) -> Answer:
    run = open_run(arguments.run_path)
    source = champion_file(run)
    tensors, metadata = read_weights(source)
    folder = Path(arguments.to)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / ("champion.safetensors" if arguments.format == "safetensors" else "champion.pt")
    if target.exists() and target.samefile(source):
        raise ClanError(f"{target} is the run's own file. Give another folder with --to.")
    _write(source, tensors, target)
    num_weights = sum(tensor.numel() for tensor in tensors.values())
    data = {
        "file": str(target),
        "format": arguments.format,
        "tensors": len(tensors),
        "weights": num_weights,
        "bytes": target.stat().st_size,
        "averaged": metadata.get("averaged") == "true",
    }
    return Answer(f"{target}: {len(tensors)} tensors, {num_weights:,} numbers, all finite", data)


def _write(source: Path, tensors: Mapping[str, Any], target: Path) -> None:
    """Copies or converts, and reads back what arrived."""
    import torch

    if target.suffix == ".safetensors":
        shutil.copyfile(source, target)
        written, _ = read_weights(target)
    else:
        torch.save(dict(tensors), target)
        written = torch.load(target, weights_only=True)
    if written.keys() != tensors.keys() or not all(torch.equal(written[name], tensors[name]) for name in tensors):
        raise ClanError(f"{target} is not what {source} holds. Check the disk, and export again.")


COMMAND = Command(
    name="export",
    summary="the champion's weights",
    description="""Copies the champion's weights out of a run's folder: every tensor is read, checked to be finite, and
read back after it was written. The names are those of the model's state_dict.""",
    examples="""  clantune export quickstart --to champion/
  clantune export quickstart --to champion/ --format pytorch    # for torch.load(..., weights_only=True)""",
    add_arguments=_add_arguments,
    run=_run,
)
