"""Pretrains a byte-level GPT with DeepSpeed; with a "clantune" block in its config, as a clan.

deepspeed --num_accelerators 4 launch/pretrain_gpt.py --deepspeed --deepspeed_config configs/quickstart.json
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import deepspeed
import torch
from corpus import Corpus
from torch.utils.data import DataLoader, Dataset, Subset
from training import add_arguments, build_gpt, forever, load_corpus

import clantune_scale


def parse_arguments() -> argparse.Namespace:
    """DeepSpeed's arguments and the script's own."""
    parser = argparse.ArgumentParser(description="Pretrains a byte-level GPT.")
    add_arguments(parser)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    """Trains, then prints the losses on validation and test text."""
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
    losses = final_losses(engine, corpus, num_windows=arguments.test_windows)
    if is_first_rank:
        for split, loss in losses.items():
            print(f"{split} loss {loss:.4f} nats per byte", flush=True)


def final_losses(engine: Any, corpus: Corpus, *, num_windows: int) -> dict[str, float]:
    """By split, the champion's losses if there is a clan; neither training nor selection has seen the test text."""
    splits = {"validation": corpus.validation, "test": corpus.test}
    clan = getattr(engine, "clan", None)
    if clan is None:
        return {name: mean_loss(engine, split, num_windows=num_windows) for name, split in splits.items()}
    champion = clan.finish().champion
    return {name: clan.evaluate(split, num_samples=num_windows)[champion] for name, split in splits.items()}


@torch.no_grad()
def mean_loss(engine: Any, dataset: Dataset, *, num_windows: int) -> float:
    """The model's mean loss on windows spread evenly over a dataset, as a clan chooses them; each rank runs all."""
    batch_size = engine.train_micro_batch_size_per_gpu()
    count = min(num_windows, len(dataset)) // batch_size * batch_size
    chosen = torch.linspace(0, len(dataset) - 1, count, dtype=torch.float64).round().long().tolist()
    engine.eval()
    batches = DataLoader(Subset(dataset, chosen), batch_size=batch_size)
    losses = [engine(batch.to(engine.device)).item() for batch in batches]
    engine.train()
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
