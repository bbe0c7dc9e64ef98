"""A regression problem, and whole clans on it: through DeepSpeed, flat data parallelism, and the reference twin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import clantune_scale
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader, StepPlan
from tests.backends.small_runs import MICRO, Net, ds_config, flat_weights, plain_engine

NUM_TRAIN, NUM_VALID = 640, 64


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Noisy linear targets: train, validation."""
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(16, 8, generator=generator)
    inputs = torch.randn(NUM_TRAIN + NUM_VALID, 16, generator=generator)
    targets = inputs @ matrix + 0.1 * torch.randn(NUM_TRAIN + NUM_VALID, 8, generator=generator)
    return TensorDataset(inputs[:NUM_TRAIN], targets[:NUM_TRAIN]), TensorDataset(
        inputs[NUM_TRAIN:], targets[NUM_TRAIN:]
    )


def clan_config(directory: Path | str, config: dict | None = None, **block: Any) -> dict:
    """A DeepSpeed config with a clan of 2 in it, rounds of 5 steps, quiet."""
    defaults = {
        "population_size": 2,
        "round_length": 5,
        "fitness": {"num_samples": NUM_VALID, "batch_size": 8},
        "tracking": {"directory": str(directory), "mlflow": False, "print_every_steps": 1000},
    }
    return (config or ds_config(0)) | {"clantune": defaults | block}


def start(config: dict, *, dropout: float = 0.0, **options: Any) -> tuple[Any, Any]:
    """An engine with its clan, and its loader."""
    train, valid = datasets()
    model = Net(dropout=dropout)
    options = {"model_parameters": model.parameters(), "eval_data": valid, **options}
    engine, _, loader, _ = clantune_scale.initialize(model=model, config=config, training_data=train, **options)
    return engine, loader


def train(engine: Any, loader: Any, num_steps: int) -> list[float]:
    """Trains to ``num_steps`` in all, as a user's loop would; the losses of its micro-batches."""
    losses = []
    while engine.global_steps < num_steps:
        for inputs in loader:
            loss = engine(*inputs)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            if engine.global_steps >= num_steps:
                break
    return losses


def flat_run(config: dict, num_steps: int, *, seed: int = 0, **options: Any) -> tuple[torch.Tensor, list[float]]:
    """Plain DeepSpeed on all ranks, its data in the clan's order; ``options`` go to ``deepspeed.initialize``."""
    engine = plain_engine(config, **options)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accumulation = engine.gradient_accumulation_steps()
    sampler = ClanBatchSampler(
        NUM_TRAIN,
        seed=seed,
        micro_batch_size=MICRO,
        dp_size=size,
        dp_rank=rank,
        member=0,
        population_size=1,
        plan=lambda step: StepPlan(False, accumulation, accumulation),
    )
    losses = train(engine, ClanDataLoader(datasets()[0], sampler), num_steps)
    return flat_weights(engine), losses
