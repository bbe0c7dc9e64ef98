"""Pretrains a byte-level GPT with DeepSpeed; with a "clantune" block in its config, as a clan.

deepspeed --num_accelerators 4 launch/pretrain_gpt.py --deepspeed --deepspeed_config configs/quickstart.json
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import torch
from corpus import Corpus, load, standard_library, text_files
from gpt import GPT
from torch.utils.data import DataLoader, Dataset

import clantune_scale


def parse_arguments() -> argparse.Namespace:
    """DeepSpeed's arguments and the script's own."""
    parser = argparse.ArgumentParser(description="Pretrains a byte-level GPT.")
    parser.add_argument("--text", type=Path, nargs="*", help="files and folders; the standard library where left out")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--context", type=int, default=128, help="bytes that the model sees")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test_windows", type=int, default=1024, help="windows of the test split for the last line")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    """Trains, then tells the test loss."""
    arguments = parse_arguments()
    is_first_rank = os.environ.get("RANK", "0") == "0"
    files = text_files(arguments.text) if arguments.text else standard_library()
    corpus = load(files, context=arguments.context)
    torch.manual_seed(arguments.seed)
    model = GPT(
        context=arguments.context,
        width=arguments.width,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        dropout=arguments.dropout,
    )
    engine, _, loader, _ = clantune_scale.initialize(
        args=arguments,
        model=model,
        model_parameters=model.parameters(),
        training_data=corpus.train,
        eval_data=corpus.validation,
    )
    for batch in forever(loader):
        loss = engine(batch.to(engine.device))
        engine.backward(loss)
        engine.step()
        if engine.global_steps >= arguments.steps:
            break
    loss = test_loss(engine, corpus, num_windows=arguments.test_windows)
    if is_first_rank:
        print(f"test loss {loss:.4f} nats per byte", flush=True)


def forever(loader: Any) -> Iterator[torch.Tensor]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


def test_loss(engine: Any, corpus: Corpus, *, num_windows: int) -> float:
    """The loss on text that neither training nor selection has seen: the champion's, where there is a clan."""
    clan = getattr(engine, "clan", None)
    if clan is None:
        return mean_loss(engine, corpus.test, num_windows=num_windows)
    summary = clan.finish()
    return clan.evaluate(corpus.test, num_samples=num_windows)[summary.champion]


@torch.no_grad()
def mean_loss(engine: Any, dataset: Dataset, *, num_windows: int) -> float:
    """The model's mean loss on a dataset's first windows, each rank on all of them."""
    batch_size = engine.train_micro_batch_size_per_gpu()
    engine.eval()
    batches = islice(DataLoader(dataset, batch_size=batch_size, drop_last=True), num_windows // batch_size)
    losses = [engine(batch.to(engine.device)).item() for batch in batches]
    engine.train()
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
