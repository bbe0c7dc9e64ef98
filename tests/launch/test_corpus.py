"""The corpus: windows that are bytes of the files, splits that share no file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.corpus import ByteWindows, load, standard_library, text_files


def test_windows_cover_the_text_and_overlap_by_one_byte():
    windows = ByteWindows(bytes(range(41)), context=10)
    rows = sorted(windows[index].tolist() for index in range(len(windows)))
    assert rows == [list(range(start, start + 11)) for start in (0, 10, 20, 30)]
    assert windows[0].dtype == torch.int64


def test_order_is_mixed_and_always_the_same():
    first, second = (ByteWindows(bytes(200) + bytes([1] * 200), context=4) for _ in range(2))
    assert all(torch.equal(first[index], second[index]) for index in range(len(first)))
    half = torch.stack([first[index] for index in range(len(first) // 2)]).float().mean().item()
    # An ordered corpus would have 0 here, a mixed one about the share of ones.
    assert 0.3 < half < 0.7


def test_splits_share_no_file(tmp_path):
    files = []
    for index in range(40):
        files.append(tmp_path / f"{index:02}.txt")
        files[-1].write_bytes(bytes([index]) * 64)
    corpus = load(files, context=1)

    def bytes_in(split):
        return set(torch.stack([split[index] for index in range(len(split))]).flatten().tolist())

    train, validation, test = map(bytes_in, (corpus.train, corpus.validation, corpus.test))
    assert validation == {5, 25} and test == {15, 35} and train == set(range(40)) - validation - test


def test_default_corpus_is_the_interpreters_own_sources():
    files = standard_library()
    assert len(files) > 300 and {"argparse.py", "json"} & {path.name for path in files}
    assert not any("test" in path.parts or "site-packages" in path.parts for path in files)
    corpus = load(files, context=128)
    assert len(corpus.train) > 10 * len(corpus.validation) > 0 and len(corpus.test) > 0


def test_folders_become_their_files(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.txt", "2.txt"):
        (tmp_path / name).write_text("x")
    assert sorted(text_files([tmp_path / "a", tmp_path / "2.txt"])) == [tmp_path / "2.txt", tmp_path / "a" / "1.txt"]


def test_too_little_text(tmp_path):
    only = Path(tmp_path / "one.txt")
    only.write_text("short")
    with pytest.raises(ValueError, match="1 files leave no window of 129 bytes for train and validation and test"):
        load([only], context=128)
