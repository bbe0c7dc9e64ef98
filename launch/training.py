"""What the training scripts share: arguments, the corpus, the model, endless batches."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from corpus import Corpus, load, standard_library, text_files
from gpt import GPT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, the model's size and the length of the run."""
    parser.add_argument("--text", type=Path, nargs="*", help="files and folders; the standard library if left out")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--context", type=int, default=128, help="bytes that the model sees")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test_windows", type=int, default=1024, help="windows of the test split for the last line")


def load_corpus(arguments: argparse.Namespace) -> Corpus:
    """The bytes of the named files, or of the standard library's sources."""
    files = text_files(arguments.text) if arguments.text else standard_library()
    return load(files, context=arguments.context)


def build_gpt(arguments: argparse.Namespace) -> GPT:
    """The model, equal on every rank: its weights are drawn from the seed."""
    torch.manual_seed(arguments.seed)
    return GPT(
        context=arguments.context,
        width=arguments.width,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        dropout=arguments.dropout,
    )


def forever(loader: Any) -> Iterator[torch.Tensor]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader
