"""DeepSpeed's pipeline engine on a small network whose first and fourth layer share a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import clantune_scale
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader, StepPlan
from tests.backends.families import Setup, join_groups
from tests.backends.small_runs import MICRO, SGD, ds_config
from tests.small_clans import datasets

__all__ = ["CASES", "MICRO", "TOLERANCE", "datasets", "start", "twin", "twin_loss"]

_FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = {
    "1-tied": Setup(pp=2, accumulation=2, clip=0.5, is_tied=True, options={"stage": 1}),
    # Without clipping: at stage 0 DeepSpeed clips a pipeline by the norm of its first stage alone.
    "0-tied": Setup(pp=2, accumulation=2, is_tied=True, options={"stage": 0}, is_slow=True),
    "1-dp": Setup(pp=2, dp=2, accumulation=2, clip=0.5, is_tied=True, options={"stage": 1}, is_slow=True),
    "0-dp": Setup(pp=2, dp=2, is_tied=True, options={"stage": 0}, is_slow=True),
    "1-bf16": Setup(
        pp=2, dtype="bf16", optimizer="sgd", accumulation=2, clip=0.5, is_tied=True, options={"stage": 1}, is_slow=True
    ),
    "1-bf16-fp32": Setup(
        pp=2, dtype="bf16", optimizer="sgd", accumulation=2, clip=0.5, is_tied=True,
        options={"stage": 1, "config": _FP32_ACCUMULATION}, is_slow=True,
    ),
}  # fmt: skip
# Two summation orders in float32, and AdamW's division by small second moments; bf16 rounds sums of gradients.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-3}


class First(nn.Module):
    """16 to 24, no bias; its weight leads back as well."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(seed)) * 0.2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(inputs.to(self.weight.dtype) @ self.weight.t())


def back(first: First, hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ first.weight


class Block(nn.Module):
    """A hidden layer around itself."""

    def __init__(self, seed: int, width: int = 24, out: int = 24) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(width, out)
        self.is_residual = width == out
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(self.linear(hidden)) if self.is_residual else self.linear(hidden)


def squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.float() - targets).square().mean()


def layers() -> list[Any]:
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    middle = [LayerSpec(Block, 1), LayerSpec(Block, 2)]
    return [
        TiedLayerSpec("first", First),
        *middle,
        TiedLayerSpec("first", First, forward_fn=back),
        LayerSpec(Block, 4, 16, 8),
    ]


class Pipeline:
    """A pipeline engine in training."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.clan = getattr(engine, "clan", None)

    def train(self, num_steps: int) -> None:
        while self.engine.global_steps < num_steps:
            self.engine.train_batch()

    def weights(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        mine = {}
        for name, parameter in self.engine.module.named_parameters():
            full = safe_get_full_fp32_param(parameter) if hasattr(parameter, "_hp_mapping") else parameter
            mine[name] = full.detach().float().clone()
        stages: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(stages, mine)
        found: dict[str, torch.Tensor] = {}
        for stage in stages:
            for name, tensor in stage.items():
                # Replicas and the copies of a tied weight are one; over four and more ranks, copies of a tied weight
                # drift apart in DeepSpeed itself, whose stages sum the same gradient in buckets of different sizes.
                assert (found.setdefault(name, tensor) - tensor).abs().max() < 1e-5, name
        return found


def start(setup: Setup, block: dict | None) -> Pipeline:
    import deepspeed

    join_groups(block)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    model = deepspeed.PipelineModule(layers(), num_stages=setup.pp, loss_fn=squared_error, partition_method="uniform")
    options = {"model": model, "model_parameters": [p for p in model.parameters() if p.requires_grad]}
    train, valid = datasets()
    config = _config(setup)
    if block is not None:
        config["clantune"] = block
        return Pipeline(clantune_scale.initialize(**options, config=config, training_data=train, eval_data=valid)[0])
    engine = deepspeed.initialize(**options, config=config)[0]
    sampler = ClanBatchSampler(
        len(train),
        seed=0,
        micro_batch_size=MICRO,
        dp_size=engine.dp_world_size,
        dp_rank=engine.grid.get_data_parallel_rank(),
        member=0,
        population_size=1,
        plan=lambda step: StepPlan(False, setup.accumulation, setup.accumulation),
    )
    engine.set_dataloader(deepspeed.utils.RepeatingLoader(ClanDataLoader(train, sampler)))
    return Pipeline(engine)


def _config(setup: Setup) -> dict:
    config = ds_config(setup.options["stage"], dtype=setup.dtype, accumulation=setup.accumulation, clip=setup.clip)
    if setup.optimizer == "sgd":
        config["optimizer"] = SGD
    config["optimizer"] = config["optimizer"] | {"params": config["optimizer"]["params"] | {"lr": setup.lr}}
    return config | setup.options.get("config", {})


class Twin(nn.Module):
    """The whole pipeline in one process, its parameters by the pipeline's names."""

    def __init__(self) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict({"first": First()})
        for name, part in {"1": Block(1), "2": Block(2), "4": Block(4, 16, 8)}.items():
            self.add_module(name, part)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        first = self.tied_modules["first"]
        hidden = first(inputs)
        for name in ("1", "2"):
            hidden = self.get_submodule(name)(hidden)
        return self.get_submodule("4")(back(first, hidden))


def twin() -> nn.Module:
    return Twin()


def twin_loss(module: nn.Module, batch: Any) -> torch.Tensor:
    return squared_error(module(batch[0]), batch[1])
