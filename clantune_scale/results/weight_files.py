"""A model's weights on disk: one safetensors file, or several with an index in Hugging Face's form."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clantune_scale.errors import ClanError

if TYPE_CHECKING:
    import torch

SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """The files of one model.

    Attributes:
        files: with the tensors, in order.
        index: names the file of each tensor; None if one file has all of them.
    """

    files: list[Path]
    index: Path | None = None

    @property
    def main(self) -> Path:
        """The file to load: the index, or the only file."""
        return self.index or self.files[0]


def find(folder: Path, stem: str) -> WeightFiles | None:
    """The weights ``stem`` in a folder, or None.

    Raises:
        ClanError: if the index is damaged, or a file that it names is missing.
    """
    index = folder / (stem + _INDEX)
    if not index.is_file():
        single = folder / (stem + SUFFIX)
        return WeightFiles([single]) if single.is_file() else None
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ClanError(f"{index} is damaged ({error!r}). Copy it again from the run's host.") from error
    files = [folder / Path(name).name for name in names]
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        raise ClanError(f"{index} names {', '.join(gone)}, and {folder} lacks it. Copy all files of the model.")
    return WeightFiles(files, index)


def read(files: WeightFiles) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """All tensors and the metadata. safetensors checks that tensors fill each file exactly.

    Raises:
        ClanError: if a file is damaged or differs from the index, or a weight is not finite.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    metadata: Mapping[str, str] = {}
    for path in files.files:
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ClanError(f"{path} is damaged: {error}. Copy it again from the run's host.") from error
    if files.index is not None:
        named = json.loads(files.index.read_text(encoding="utf-8"))["weight_map"].keys()
        if named != tensors.keys():
            odd = sorted(named ^ tensors.keys())[:3]
            raise ClanError(f"{files.index} and its files disagree about {', '.join(odd)}. Copy all of them again.")
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ClanError(f"{files.main} has weights that are not finite: {', '.join(broken[:3])}. Do not use them.")
    return tensors, metadata


def write(
    tensors: Mapping[str, torch.Tensor] | None,
    folder: Path,
    stem: str,
    *,
    gather: Callable[[Any], list[Any]],
    place: int,
    max_bytes: int,
    metadata: Mapping[str, str],
) -> str:
    """Writes each rank's part of a model; all ranks of a member call it.

    Args:
        tensors: this rank's; no other rank has one of these names. None if it has none.
        folder: to write into.
        stem: with which the files' names begin.
        gather: returns what each rank of the member gave, by rank.
        place: this rank's number in the member.
        max_bytes: of one file's tensors. A single larger tensor has a file of its own.
        metadata: of each file.

    Returns:
        The name of the file to load, equal on all ranks: the only file, or the index. When all ranks have written
        their files, rank 0 calls :func:`settle`, which gives the index its name.

    Raises:
        OSError: if the file system refuses.
    """
    parts = _split(tensors or {}, max_bytes)
    said = gather([{name: tensor.nbytes for name, tensor in part.items()} for part in parts])
    first = sum(len(theirs) for theirs in said[:place])
    names = _names(stem, sum(len(theirs) for theirs in said))
    for part, name in zip(parts, names[first:], strict=False):
        _save(part, folder / name, metadata)
    if len(names) == 1:
        return names[0]
    if place == 0:
        sizes = [size for theirs in said for size in theirs]
        content = {
            "metadata": {"total_size": sum(sum(size.values()) for size in sizes)},
            "weight_map": {tensor: name for name, size in zip(names, sizes, strict=True) for tensor in size},
        }
        # It has another name until all files are there: a program that finds an index may load what it names.
        (folder / f"{stem}{_INDEX}.part").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return stem + _INDEX


def settle(folder: Path, stem: str, name: str) -> None:
    """Gives the index its name and removes what an earlier model left. One rank calls it when all have written.

    Args:
        folder, stem: as for :func:`write`.
        name: what :func:`write` returned.
    """
    index, single = folder / (stem + _INDEX), folder / (stem + SUFFIX)
    if name == index.name:
        os.replace(folder / f"{name}.part", index)
        single.unlink(missing_ok=True)
    else:
        index.unlink(missing_ok=True)


def _names(stem: str, count: int) -> list[str]:
    if count <= 1:
        return [stem + SUFFIX]
    return [f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]


def _split(tensors: Mapping[str, torch.Tensor], max_bytes: int) -> list[dict[str, torch.Tensor]]:
    """The tensors in their order, in parts of at most ``max_bytes``. A larger tensor has a part of its own."""
    parts: list[dict[str, torch.Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not parts or tensor.nbytes > room:
            parts.append({})
            room = max_bytes
        parts[-1][name] = tensor
        room -= tensor.nbytes
    return parts


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata=dict(metadata))
    # safetensors makes its file private. It becomes as readable as the run's other files.
    part.chmod(0o644)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
