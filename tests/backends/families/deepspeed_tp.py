"""DeepSpeed with tensor parallelism: its own (AutoTP), or layers in Megatron's manner with an ``mpu``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import clantune_scale
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader, StepPlan
from tests.backends.families import Setup, is_on_line, join_groups
from tests.backends.small_runs import MICRO, SGD, ds_config
from tests.backends.tensor_layers import DIMENSIONS, Mpu, Sharded, Whole
from tests.small_clans import datasets, train

__all__ = ["CASES", "MICRO", "TOLERANCE", "datasets", "start", "twin", "twin_loss"]

CASES = {
    "auto-1": Setup(tp=2, accumulation=2, clip=0.5, options={"stage": 1, "kind": "auto"}, is_slow=True),
    # By deepspeed.tp_model_init, as Hugging Face's Trainer does it, and not by the config.
    "auto-0": Setup(tp=2, clip=0.5, options={"stage": 0, "kind": "auto", "is_recorded": True}, is_slow=True),
    "auto-2": Setup(tp=2, accumulation=2, clip=0.5, options={"stage": 2, "kind": "auto"}, is_slow=True),
    "auto-3": Setup(tp=2, accumulation=2, clip=0.5, options={"stage": 3, "kind": "auto"}, is_slow=True),
    "auto-dp": Setup(tp=2, dp=2, accumulation=2, clip=0.5, options={"stage": 1, "kind": "auto"}, is_slow=True),
    "auto-bf16": Setup(
        tp=2, dtype="bf16", optimizer="sgd", clip=0.5, options={"stage": 1, "kind": "auto"}, is_slow=True
    ),
    "mpu-1": Setup(tp=2, accumulation=2, clip=0.5, options={"stage": 1, "kind": "mpu"}, is_slow=True),
    "mpu-0": Setup(tp=2, clip=0.5, options={"stage": 0, "kind": "mpu"}, is_slow=True),
    "mpu-dp": Setup(tp=2, dp=2, accumulation=2, clip=0.5, options={"stage": 2, "kind": "mpu"}, is_slow=True),
}
# Two summation orders in float32, and AdamW's division by small second moments; bf16 rounds sums of gradients.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-3}
_AUTO = {
    "partition_config": {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": [r".*up\.weight$"], "partition_type": "column"},
            {"patterns": [r".*down\.weight$"], "partition_type": "row"},
        ],
    },
}


class TensorParallel:
    """An engine in training whose ranks hold shards."""

    def __init__(self, engine: Any, loader: Any) -> None:
        self.engine, self.loader = engine, loader
        self.clan = getattr(engine, "clan", None)

    def train(self, num_steps: int) -> None:
        if not is_on_line(self.clan):
            train(self.engine, self.loader, num_steps)
            return
        for step in self.clan.steps(self.loader, until=num_steps):
            for batch in step:
                self.engine.backward(self.engine(*batch))
                self.engine.step()

    def weights(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        tp_group = self.engine.mpu.get_tensor_model_parallel_group()
        for name, parameter in self.engine.module.named_parameters():
            is_wrapped = hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
            mine = safe_get_full_fp32_param(parameter) if is_wrapped else parameter
            mine = mine.detach().float().clone()
            shards = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(shards, mine, group=tp_group)
            if name not in DIMENSIONS:
                assert torch.equal(*shards), name
            found[name] = torch.cat(shards, DIMENSIONS[name]) if name in DIMENSIONS else mine
        return found


def start(setup: Setup, block: dict | None) -> TensorParallel:
    import deepspeed

    join_groups(block)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    options: dict[str, Any] = {}
    if setup.options["kind"] == "mpu":
        deepspeed.init_distributed("gloo")
        options["mpu"] = Mpu(setup.tp)
        model: nn.Module = Sharded(options["mpu"])
    else:
        model = Whole()
        if setup.options.get("is_recorded"):
            model = deepspeed.tp_model_init(model, tp_size=setup.tp, dtype=torch.float32)
    options |= {"model": model, "model_parameters": model.parameters(), "config": _config(setup)}
    train_set, valid = datasets()
    if block is not None:
        options["config"]["clantune"] = block
        engine, _, loader, _ = clantune_scale.initialize(**options, training_data=train_set, eval_data=valid)
        return TensorParallel(engine, loader)
    engine = deepspeed.initialize(**options)[0]
    sampler = ClanBatchSampler(
        len(train_set),
        seed=0,
        micro_batch_size=MICRO,
        dp_size=engine.dp_world_size,
        dp_rank=dist.get_rank(engine.data_parallel_group),
        member=0,
        population_size=1,
        plan=lambda step: StepPlan(False, setup.accumulation, setup.accumulation),
    )
    return TensorParallel(engine, ClanDataLoader(train_set, sampler))


def _config(setup: Setup) -> dict:
    config = ds_config(setup.options["stage"], dtype=setup.dtype, accumulation=setup.accumulation, clip=setup.clip)
    if setup.optimizer == "sgd":
        config["optimizer"] = SGD
    config["optimizer"] = config["optimizer"] | {"params": config["optimizer"]["params"] | {"lr": setup.lr}}
    if setup.options["kind"] == "auto":
        degree = {} if setup.options.get("is_recorded") else {"autotp_size": setup.tp}
        config["tensor_parallel"] = _AUTO | degree
    return config


def twin() -> nn.Module:
    return Whole()


def twin_loss(module: nn.Module, batch: Any) -> torch.Tensor:
    return module(*batch)
