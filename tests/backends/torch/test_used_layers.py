"""Members that use different layers in one step, as a routing by data does, and members that skip a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import clantune_scale
from clantune_scale.errors import DivergenceError
from tests.backends.small_runs import in_member_worlds
from tests.ranks import RankError, run_ranks

STEPS = 4
#: By step, the expert that each rank's batch goes to. Expert 3 is never used.
ROUTES = [(0, 1), (1, 1), (2, 0), (1, 2)]


class Experts(nn.Module):
    """Four layers of one size, of which a batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(4, 1) for _ in range(4))
        self.which = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.experts[self.which](inputs) - 1).square().mean()


def _data() -> torch.Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def _block(directory: str, **changes: Any) -> dict[str, Any]:
    return {
        "population_size": 2,
        "round_length": STEPS,
        "strategy": "control",
        "genes": ["lr"],
        "fitness": {"num_samples": 16},
        "tracking": {"directory": directory, "mlflow": False},
        "checkpoint": {"every_rounds": None},
    } | changes


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


def _step(model: nn.Module, experts: Experts, step: int, rank: int) -> None:
    experts.which = ROUTES[step][rank]
    model(_data()[2 * step + 8 * rank : 2 * step + 8 * rank + 2]).backward()


def _trained(rank: int, directory: str | None) -> dict[str, list[float]]:
    """Weights after the steps of plain data parallelism over all ranks, or of a clan whose members are one rank."""
    if directory is not None:
        clantune_scale.join(_block(directory))
    dist.init_process_group("gloo")
    found = {}
    for name, optimizer_of in OPTIMIZERS.items():
        is_view = name == "adam"
        model = DistributedDataParallel(Experts(), find_unused_parameters=True, gradient_as_bucket_view=is_view)
        optimizer = optimizer_of(model.parameters())
        clan = None
        if directory is not None:
            block = _block(directory)
            clan = clantune_scale.attach(model, optimizer, config=block, eval_data=_data(), micro_batch_size=2)
        for step in range(STEPS):
            _step(model, model.module, step, rank)
            optimizer.step()
            optimizer.zero_grad()
        found[name] = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
        if clan is not None:
            clan.finish()
    return found


def test_ddp_averages_layer_by_layer_as_over_all_ranks(tmp_path):
    plain = run_ranks(2, in_member_worlds, _trained, None)
    clan = run_ranks(2, in_member_worlds, _trained, str(tmp_path))
    assert plain[0] == plain[1] == clan[0] == clan[1]
    untouched = torch.cat([p.detach().flatten() for p in Experts().experts[3].parameters()]).tolist()
    assert plain[0]["adam"][-5:] == untouched
    assert plain[0]["adam"][:5] != torch.cat([p.detach().flatten() for p in Experts().experts[0].parameters()]).tolist()


def _sharded(rank: int, directory: str) -> str:
    clantune_scale.join(_block(directory))
    dist.init_process_group("gloo")
    model = Experts()
    for expert in model.experts:
        fully_shard(expert)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = _block(directory)
    clan = clantune_scale.attach(model, optimizer, config=config, eval_data=_data(), micro_batch_size=2)
    try:
        for step, expert in enumerate((0, 1 + rank, 0, 0)):
            model.which = expert
            model(_data()[2 * step : 2 * step + 2]).backward()
            optimizer.step()
            optimizer.zero_grad()
    except DivergenceError as error:
        return f"{clan.num_steps}: {error}"
    return ""


def test_fsdp_says_at_the_phases_end_that_layers_differed_in_a_step_before(tmp_path):
    for said in run_ranks(2, in_member_worlds, _sharded, str(tmp_path)):
        assert said.startswith("3: members averaged their gradients in different orders in a step of this phase")


def _skipping(rank: int, directory: str, kind: str) -> None:
    clantune_scale.join(_block(directory))
    dist.init_process_group("gloo")
    model: nn.Module = Experts()
    if kind == "fsdp":
        fully_shard(model)
    else:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = _block(directory)
    clan = clantune_scale.attach(model, optimizer, config=config, eval_data=_data(), micro_batch_size=2)
    for step in clan.steps(clan.loader(_data()), until=STEPS):
        for batch in step:
            loss = model(batch)
            if rank == 1 and clan.num_steps == 1:
                continue
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_member_that_skips_a_backward_pass_is_told_at_once(kind, tmp_path):
    message = "rank 1 of 2 failed:\nClanError: this member shared no gradient in optimizer step 2, and the others wait"
    with pytest.raises(RankError, match=message):
        run_ranks(2, in_member_worlds, _skipping, str(tmp_path), kind)
