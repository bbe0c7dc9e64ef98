"""Pretrains a byte-level GPT as a clan on the line: one model, in one process or under DDP.

python launch/pretrain_gpt_line.py --config configs/line.json
torchrun --nproc_per_node 4 launch/pretrain_gpt_line.py --config configs/line.json
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import add_arguments, build_gpt, load_corpus

import clantune_scale


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrains a byte-level GPT, its clan on the line.")
    parser.add_argument("--config", type=Path, required=True, help='JSON file: batch sizes and the "clantune" block')
    parser.add_argument("--lr", type=float, default=1e-3)
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Trains, then prints the losses on validation and test text."""
    arguments = parse_arguments()
    device, is_parallel = start_torch()
    model = build_gpt(arguments).to(device)
    if is_parallel:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.1)
    corpus = load_corpus(arguments)
    clan = clantune_scale.attach(
        model,
        optimizer,
        config=arguments.config,
        eval_data=corpus.validation,
        num_samples=len(corpus.train),
    )
    for step in clan.steps(clan.loader(corpus.train), until=arguments.steps):
        for windows in step:
            (model(windows.to(device)) / len(step)).backward()
        clan.clip_grad_norm_()
        optimizer.step()
        optimizer.zero_grad()
    champion = clan.finish().champion
    for name, split in {"validation": corpus.validation, "test": corpus.test}.items():
        loss = clan.evaluate(split, num_samples=arguments.test_windows)[champion]
        if not is_parallel or dist.get_rank() == 0:
            print(f"{name} loss {loss:.4f} nats per byte", flush=True)
    if is_parallel:
        dist.destroy_process_group()


def start_torch() -> tuple[torch.device, bool]:
    """This rank's device, and whether there is a process group: torchrun's ranks make one."""
    is_parallel = "RANK" in os.environ
    if not torch.cuda.is_available():
        if is_parallel:
            dist.init_process_group("gloo")
        return torch.device("cpu"), is_parallel
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if is_parallel:
        dist.init_process_group("nccl")
    return device, is_parallel


if __name__ == "__main__":
    main()
