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
from clantune_scale.results import weight_files
from clantune_scale.results.weight_files import WeightFiles
from clantune_scale.tracking.history import end_of

STEM = "champion"


def champion_files(run: OpenedRun) -> WeightFiles:
    """The champion's weights in a run's folder: those of its end, else the last that were saved on the way.

    Raises:
        ClanError: if the run goes on and saved none, kept no weights, or a file is gone.
    """
    on_the_way = sorted(run.folder.glob(f"{STEM}-step-*"), reverse=True)
    for folder in (run.folder, *on_the_way):
        found = weight_files.find(folder, STEM)
        if found is not None:
            return found
    end = end_of(run.events)
    if end is None:
        raise ClanError(
            f"{run.folder.name} has not ended: weights are written at the end, or when the script calls "
            f"engine.clan.save_champion(). Wait for it."
        )
    written = end.get("artifacts", {}).get("champion")
    if written is None:
        raise ClanError(
            f"{run.folder.name} kept no weights as safetensors ({end['status']}, champion {end.get('champion')}). "
            f"Put 'safetensors' into clantune.checkpoint.champion for the next one."
        )
    path = run.folder / Path(written).name
    raise ClanError(f"{path} is missing; the run wrote it as {written} on its host. Copy it from there.")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--to", metavar="FOLDER", default=".", help="target folder (default: the current one)")
    parser.add_argument("--format", choices=("safetensors", "pytorch"), default="safetensors")


def _run(arguments: argparse.Namespace) -> Answer:
    run = open_run(arguments.run_path)
    source = champion_files(run)
    tensors, metadata = weight_files.read(source)
    folder = Path(arguments.to)
    folder.mkdir(parents=True, exist_ok=True)
    if folder.samefile(source.main.parent):
        raise ClanError(f"{folder / source.main.name} is the run's own file. Give another folder with --to.")
    files = _write(source, tensors, folder, arguments.format)
    num_weights = sum(tensor.numel() for tensor in tensors.values())
    data = {
        "file": str(files[0]),
        "files": [str(file) for file in files],
        "format": arguments.format,
        "tensors": len(tensors),
        "weights": num_weights,
        "bytes": sum(file.stat().st_size for file in files),
        "averaged": metadata.get("averaged") == "true",
    }
    several = f" and {len(files) - 1} files beside it" if len(files) > 1 else ""
    return Answer(f"{files[0]}{several}: {len(tensors)} tensors, {num_weights:,} numbers, all finite", data)


def _write(source: WeightFiles, tensors: Mapping[str, Any], folder: Path, kind: str) -> list[Path]:
    """Copies or converts, and reads back what arrived; the files, the one to load first."""
    import torch

    if kind == "safetensors":
        files = [source.main] + [file for file in source.files if file != source.main]
        targets = [Path(shutil.copyfile(file, folder / file.name)) for file in files]
        arrived = weight_files.find(folder, STEM)
        written = weight_files.read(arrived)[0] if arrived is not None else {}
    else:
        targets = [folder / f"{STEM}.pt"]
        torch.save(dict(tensors), targets[0])
        written = torch.load(targets[0], weights_only=True)
    if written.keys() != tensors.keys() or not all(torch.equal(written[name], tensors[name]) for name in tensors):
        raise ClanError(f"{targets[0]} is not what {source.main} holds. Check the disk, and export again.")
    return targets


COMMAND = Command(
    name="export",
    summary="the champion's weights",
    description="""Copies the champion's weights out of a run's folder: every tensor is read, checked to be finite, and
read back after it was written. The names are those of the model's state_dict. A model in several files comes with
its index. While a run goes on, the last output of engine.clan.save_champion() is exported.""",
    examples="""  clantune export quickstart --to champion/
  clantune export quickstart --to champion/ --format pytorch    # for torch.load(..., weights_only=True)""",
    add_arguments=_add_arguments,
    run=_run,
)
