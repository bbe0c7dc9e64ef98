"""A small network, its data and a DeepSpeed config: what the backend's tests train."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clantune_scale.backends.deepspeed import DeepSpeedBackend
from clantune_scale.distributed import world

MICRO = 4


class Net(nn.Module):
    """Two hidden layers; the forward pass gives the loss, in float32 whatever the weights are in."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second, self.last = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 8)
        self.drop = nn.Dropout(dropout)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(inputs.to(self.first.weight.dtype)))
        hidden = hidden + torch.tanh(self.second(self.drop(hidden)))
        return (self.last(hidden).float() - targets).square().mean()


def batch(step: int, micro: int, flat_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The micro-batch that ``flat_rank`` of plain data parallelism sees."""
    generator = torch.Generator().manual_seed(1000 + step * 97 + micro * 13 + flat_rank * 7919)
    return torch.randn(MICRO, 16, generator=generator), torch.randn(MICRO, 8, generator=generator)


def ds_config(stage: int, *, dtype: str = "fp32", accumulation: int = 1, clip: float = 0.0, **extra: Any) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01, "torch_adam": True},
        },
    }
    if stage == 3:
        # By default parameters this small are kept whole, and partitioning would not be tested.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    return config | extra


SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}


def plain_engine(config: dict, **options: Any) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = Net()
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, **options)[0]


def member_engine(config: dict, population_size: int) -> tuple[world.ClanWorld, DeepSpeedBackend]:
    """Joins, makes the member's engine, no clan attached."""
    joined = world.join(population_size, timeout_s=60)
    return joined, DeepSpeedBackend(plain_engine(config))


def train_step(engine: Any, step: int, flat_rank: int) -> float:
    total = 0.0
    for micro in range(engine.gradient_accumulation_steps()):
        loss = engine(*batch(step, micro, flat_rank))
        engine.backward(loss)
        engine.step()
        total += loss.item()
    return total


def flat_weights(engine: Any) -> torch.Tensor:
    """Every fp32 weight of the member in one vector, the same on all its ranks."""
    from deepspeed.utils import safe_get_full_fp32_param

    parts = []
    for parameter in engine.module.parameters():
        full = (
            safe_get_full_fp32_param(parameter)
            if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
            else None
        )
        parts.append((parameter if full is None else full).detach().float().reshape(-1).clone())
    return torch.cat(parts)


def in_member_worlds(function: Callable[..., Any], *args: Any) -> Any:
    """Runs and leaves the process group in order, so that no rank ends while another still talks."""
    result = function(int(os.environ["RANK"]), *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return result
