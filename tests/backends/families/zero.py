"""DeepSpeed's ZeRO 0 to 3 on a small network."""

from __future__ import annotations

import os
from typing import Any

import torch

from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader, StepPlan
from tests.backends.families import Setup, is_on_line
from tests.backends.small_runs import MICRO, SGD, Net, ds_config, plain_engine
from tests.small_clans import datasets, train
from tests.small_clans import start as start_clan

__all__ = ["CASES", "LINE_CASES", "MICRO", "TOLERANCE", "datasets", "start", "twin", "twin_loss"]

CASES = {
    "0": Setup(dp=2, accumulation=2, clip=0.5, options={"stage": 0}, is_slow=True),
    "1": Setup(dp=2, clip=0.5, options={"stage": 1}, is_slow=True),
    "2": Setup(dp=2, accumulation=2, clip=0.5, options={"stage": 2}, is_slow=True),
    "3": Setup(dp=2, accumulation=2, clip=0.5, options={"stage": 3}, is_slow=True),
    "1-three": Setup(members=3, options={"stage": 1}, is_slow=True),
    "1-bf16": Setup(dp=2, dtype="bf16", optimizer="sgd", clip=0.5, options={"stage": 1}, is_slow=True),
    "3-bf16": Setup(dp=2, dtype="bf16", optimizer="sgd", clip=0.5, options={"stage": 3}, is_slow=True),
}
# As two members each, these would only repeat cases above.
LINE_CASES = {
    "2-offload": Setup(
        dp=2, clip=0.5, options={"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}}, is_slow=True
    ),
    "3-offload": Setup(
        dp=2, clip=0.5, options={"stage": 3, "zero": {"offload_optimizer": {"device": "cpu"}}}, is_slow=True
    ),
}
# Two summation orders in float32, and AdamW's division by small second moments; bf16 rounds sums of gradients.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-3}


class Zero:
    """A DeepSpeed engine in training."""

    def __init__(self, engine: Any, loader: Any) -> None:
        self._engine, self._loader = engine, loader
        self.clan = getattr(engine, "clan", None)

    def train(self, num_steps: int) -> None:
        if not is_on_line(self.clan):
            train(self._engine, self._loader, num_steps)
            return
        for step in self.clan.steps(self._loader, until=num_steps):
            for batch in step:
                self._engine.backward(self._engine(*batch))
                self._engine.step()

    def weights(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, parameter in self._engine.module.named_parameters():
            is_wrapped = hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
            full = safe_get_full_fp32_param(parameter) if is_wrapped else parameter
            found[name] = full.detach().float().clone()
        return found


def start(setup: Setup, block: dict | None) -> Zero:
    config = _config(setup)
    if block is not None:
        return Zero(*start_clan(config | {"clantune": block}))
    engine = plain_engine(config)
    sampler = ClanBatchSampler(
        len(datasets()[0]),
        seed=0,
        micro_batch_size=MICRO,
        dp_size=int(os.environ["WORLD_SIZE"]),
        dp_rank=int(os.environ["RANK"]),
        member=0,
        population_size=1,
        plan=lambda step: StepPlan(False, setup.accumulation, setup.accumulation),
    )
    return Zero(engine, ClanDataLoader(datasets()[0], sampler))


def _config(setup: Setup) -> dict:
    config = ds_config(setup.options["stage"], dtype=setup.dtype, accumulation=setup.accumulation, clip=setup.clip)
    if "zero" in setup.options:
        config["zero_optimization"] = config["zero_optimization"] | setup.options["zero"]
        config["zero_force_ds_cpu_optimizer"] = False
    if setup.optimizer == "sgd":
        config["optimizer"] = SGD
    config["optimizer"]["params"] = config["optimizer"]["params"] | {"lr": setup.lr}
    return config


def twin() -> torch.nn.Module:
    return Net()


def twin_loss(module: torch.nn.Module, batch: Any) -> torch.Tensor:
    return module(*batch)
