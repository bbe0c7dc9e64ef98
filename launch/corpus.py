"""Bytes of text files as training, validation and test windows; by default Python's own standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

_TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}


class ByteWindows(Dataset[Tensor]):
    """Windows of ``context + 1`` bytes, one after the other, in a fixed random order.

    The order makes any first part of it a sample of all files.

    Args:
        data: the bytes.
        context: bytes that a model sees before the last one that it predicts.
    """

    def __init__(self, data: bytes, *, context: int) -> None:
        self._data = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))
        self._context = context
        num_windows = max(0, (len(data) - 1) // context)
        self._order = torch.randperm(num_windows, generator=torch.Generator().manual_seed(0)).tolist()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Tensor:
        """[context + 1] int64."""
        start = self._order[index] * self._context
        return self._data[start : start + self._context + 1].long()


@dataclass(frozen=True)
class Corpus:
    """Three disjoint splits: no file is in two of them."""

    train: ByteWindows
    validation: ByteWindows
    test: ByteWindows


def standard_library() -> list[Path]:
    """The running interpreter's own Python sources, without their tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return [path for path in root.rglob("*.py") if not _TEST_FOLDERS & set(path.relative_to(root).parts)]


def text_files(paths: Iterable[Path]) -> list[Path]:
    """``paths`` with every folder replaced by the files in it."""
    return [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]


def load(files: Sequence[Path], *, context: int) -> Corpus:
    """Reads files and splits them: one in twenty for validation, one for testing, the others for training.

    Raises:
        ValueError: if a split has no window, because there are too few files or too little text.
    """
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for index, path in enumerate(sorted(files)):
        name = {5: "validation", 15: "test"}.get(index % 20, "train")
        parts[name].append(path.read_bytes())
    splits = {name: ByteWindows(b"".join(texts), context=context) for name, texts in parts.items()}
    empty = [name for name, split in splits.items() if not len(split)]
    if empty:
        raise ValueError(
            f"{len(files)} files leave no window of {context + 1} bytes for {' and '.join(empty)}. "
            f"Give at least 16 files, or larger ones."
        )
    return Corpus(**splits)
