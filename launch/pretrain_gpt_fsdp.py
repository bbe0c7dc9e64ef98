"""Pretrains a byte-level GPT as a clan in a plain PyTorch loop, members sharded by FSDP2.

torchrun --nproc_per_node 4 launch/pretrain_gpt_fsdp.py --config configs/fsdp2.json
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from gpt import GPT
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training import add_arguments, build_gpt, load_corpus

import clantune_scale


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrains a byte-level GPT with FSDP2.")
    parser.add_argument("--config", type=Path, required=True, help='JSON file: batch sizes and the "clantune" block')
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, reduce gradients in float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile for each block")
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Trains, then prints the champion's test loss."""
    arguments = parse_arguments()
    world = clantune_scale.join(arguments.config)
    # From here on the world is the member's: its process group, its mesh, its shards.
    device = start_torch()
    model = shard(build_gpt(arguments).to(device), arguments)
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
    summary = clan.finish()
    loss = clan.evaluate(corpus.test, num_samples=arguments.test_windows)[summary.champion]
    if world.is_clan_leader:
        print(f"test loss {loss:.4f} nats per byte", flush=True)
    dist.destroy_process_group()


def start_torch() -> torch.device:
    """The member's process group; this rank's device."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device


def shard(model: GPT, arguments: argparse.Namespace) -> GPT:
    """Each block by itself, then what is left (the tied embedding, the last norm)."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if arguments.bf16 else MixedPrecisionPolicy()
    for block in model.blocks:
        if arguments.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


if __name__ == "__main__":
    main()
