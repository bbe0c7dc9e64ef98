"""DeepSpeed's mixture-of-experts layer, its experts spread over the ranks of a member."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import clantune_scale
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader, StepPlan
from tests.backends.families import Setup, is_on_line, join_groups
from tests.backends.small_runs import MICRO, ds_config
from tests.small_clans import datasets, train

__all__ = ["CASES", "MICRO", "TOLERANCE", "datasets", "start", "twin", "twin_loss"]

# Expert-parallel degree 2 over two data-parallel ranks, and two replicas of that in one member.
CASES = {
    "1": Setup(dp=2, accumulation=2, clip=0.5, options={"stage": 1}, is_slow=True),
    "0": Setup(dp=2, clip=0.0, options={"stage": 0}, is_slow=True),
    "2": Setup(dp=2, accumulation=2, options={"stage": 2}, is_slow=True),
    "1-dp": Setup(dp=4, accumulation=2, options={"stage": 1}, is_slow=True),
}
# Two summation orders in float32, and AdamW's division by small second moments.
TOLERANCE = {"fp32": 2e-6}
NUM_EXPERTS = 4
_EXPERTS = "moe.deepspeed_moe.experts.deepspeed_experts."


class Expert(nn.Module):
    """A hidden layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)
        fill(self, seed)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(inputs)))


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


class Mixed(nn.Module):
    """A layer of experts around the inputs, then a linear one. No sample is dropped and nothing is drawn."""

    def __init__(self) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.moe = MoE(16, Expert(), NUM_EXPERTS, ep_size=2, k=1, drop_tokens=False, use_rts=False)
        self.last = nn.Linear(16, 8)
        fill(self.last, 1)
        fill(self.moe.deepspeed_moe.gate, 2)
        first = dist.get_rank() % 2 * (NUM_EXPERTS // 2)
        for index, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            fill(expert, 10 + first + index)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        mixed, _, _ = self.moe(inputs)
        return (self.last(inputs + mixed) - targets).square().mean()


class Twin(nn.Module):
    """The same with all experts in one process."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, NUM_EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert(10 + index) for index in range(NUM_EXPERTS))
        self.last = nn.Linear(16, 8)
        fill(self.last, 1)
        fill(self.gate, 2)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gates = torch.softmax(self.gate(inputs), dim=1)
        weight, chosen = gates.max(dim=1)
        outputs = torch.stack([expert(inputs) for expert in self.experts], dim=1)
        mixed = weight[:, None] * outputs[torch.arange(len(inputs)), chosen]
        return (self.last(inputs + mixed) - targets).square().mean()


class Experts:
    """An engine in training whose ranks hold different experts."""

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

        mine = {}
        for name, parameter in self.engine.module.named_parameters():
            full = safe_get_full_fp32_param(parameter) if hasattr(parameter, "_hp_mapping") else parameter
            mine[_twin_name(name, dist.get_rank() % 2)] = full.detach().float().clone()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        found: dict[str, torch.Tensor] = {}
        for one in everyone:
            for name, tensor in one.items():
                assert torch.equal(found.setdefault(name, tensor), tensor), name
        return found


def _twin_name(name: str, expert_rank: int) -> str:
    if name.startswith(_EXPERTS):
        local, _, rest = name.removeprefix(_EXPERTS).partition(".")
        return f"experts.{expert_rank * (NUM_EXPERTS // 2) + int(local)}.{rest}"
    return name.replace("moe.deepspeed_moe.gate.wg", "gate")


def start(setup: Setup, block: dict | None) -> Experts:
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    join_groups(block)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    model = Mixed()
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all parameters"}
    )
    config = ds_config(setup.options["stage"], accumulation=setup.accumulation, clip=setup.clip)
    params = config["optimizer"]["params"] | {"lr": setup.lr}
    params.pop("torch_adam")
    config.pop("optimizer")
    params["betas"] = tuple(params["betas"])
    options = {"model": model, "optimizer": torch.optim.AdamW(groups, **params), "config": config}
    train_set, valid = datasets()
    if block is not None:
        config["clantune"] = block
        engine, _, loader, _ = clantune_scale.initialize(**options, training_data=train_set, eval_data=valid)
        return Experts(engine, loader)
    engine = deepspeed.initialize(**options)[0]
    sampler = ClanBatchSampler(
        len(train_set),
        seed=0,
        micro_batch_size=MICRO,
        dp_size=dist.get_world_size(),
        dp_rank=dist.get_rank(),
        member=0,
        population_size=1,
        plan=lambda step: StepPlan(False, setup.accumulation, setup.accumulation),
    )
    return Experts(engine, ClanDataLoader(train_set, sampler))


def twin() -> nn.Module:
    return Twin()


def twin_loss(module: nn.Module, batch: Any) -> torch.Tensor:
    return module(*batch)
