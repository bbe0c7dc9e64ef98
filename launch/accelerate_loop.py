"""Pretrains a byte-level GPT in a plain loop by Hugging Face Accelerate, which a clan on the line tunes.

accelerate launch launch/accelerate_loop.py --config configs/line.json
accelerate launch --num_processes 2 launch/accelerate_loop.py --config configs/line.json --batch 16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from training import add_arguments, build_gpt, forever, load_corpus

from clantune_scale.integrations.accelerate import attach


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrains a byte-level GPT in a loop by Accelerate.")
    parser.add_argument("--config", type=Path, required=True, help='JSON file with the "clantune" block')
    parser.add_argument("--batch", type=int, default=32, help="windows per device and micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--cpu", action="store_true", help="do not use a device")
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Trains, then prints the losses on validation and test text."""
    arguments = parse_arguments()
    accelerator = Accelerator(gradient_accumulation_steps=arguments.accumulation, cpu=arguments.cpu)
    set_seed(arguments.seed)
    corpus = load_corpus(arguments)
    model = build_gpt(arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.1)
    loader = DataLoader(corpus.train, batch_size=arguments.batch, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    clan = attach(
        accelerator,
        model,
        optimizer,
        config=arguments.config,
        eval_data=corpus.validation,
        total_steps=arguments.steps,
    )
    model.train()
    for windows in forever(loader):
        with accelerator.accumulate(model):
            accelerator.backward(model(windows))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), arguments.clip)
            optimizer.step()
            optimizer.zero_grad()
        if clan.num_steps == arguments.steps:
            break
    champion = clan.finish().champion
    for name, split in {"validation": corpus.validation, "test": corpus.test}.items():
        loss = clan.evaluate(split, num_samples=arguments.test_windows)[champion]
        accelerator.print(f"{name} loss {loss:.4f} nats per byte", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
