"""Pretrains a byte-level GPT with DeepSpeed; with a "clantune" block in its config, as a clan.

deepspeed --num_accelerators 4 launch/pretrain_gpt.py --deepspeed --deepspeed_config configs/quickstart.json
"""

from __future__ import annotations

import argparse
import os
from itertools import islice
from typing import Any

import deepspeed
import torch
from corpus import Corpus
from torch.utils.data import DataLoader, Dataset
from training import add_arguments, build_gpt, forever, load_corpus

import clantune_scale


def parse_arguments() -> argparse.Namespace:
    """DeepSpeed's arguments and the script's own."""
    parser = argparse.ArgumentParser(description="Pretrains a byte-level GPT.")
    add_arguments(parser)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    """Trains, then tells the test loss."""
    arguments = parse_arguments()
    is_first_rank = os.environ.get("RANK", "0") == "0"
    corpus, model = load_corpus(arguments), build_gpt(arguments)
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
