"""All of an optimizer's state in groups: cloned, taken back to before the first step, measured, saved, or refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import clantune_scale
from clantune_scale.distributed import world
from clantune_scale.errors import ClanError
from clantune_scale.transfer import Snapshot
from tests.backends.small_runs import MICRO, Net, batch, in_member_worlds
from tests.ranks import run_ranks
from tests.runtime.line.test_optimizers import ScheduleFree
from tests.small_clans import datasets

STEPS = 3


class Counting(torch.optim.Optimizer):
    """Keeps a number in each group and for each parameter, and makes a moment of ones; ``extra`` is put in on top."""

    def __init__(self, params: Any, lr: float, extra: str = "") -> None:
        super().__init__(params, {"lr": lr, "distance": 1e-6})
        self._extra = extra

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["distance"] *= 2
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"count": 0, "moment": torch.ones_like(p)}
                state["count"] += 1
                state["moment"].mul_(0.5).add_(p.grad)
                p.sub_(state["moment"], alpha=group["lr"] * state["count"] / (1 + group["distance"]))
                if self._extra == "list":
                    state["factors"] = [torch.zeros(2)]
        if self._extra == "group":
            self.param_groups[0]["history"] = torch.zeros(3)
        if self._extra == "global":
            self.state["all"] = {"norm": torch.zeros(2)}


OPTIMIZERS = {
    "counting": lambda p: Counting(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "schedule-free": lambda p: ScheduleFree(p, lr=0.1),
}


def _block(directory: str, **changes: Any) -> dict[str, Any]:
    return {
        "population_size": 2,
        "round_length": 50,
        "strategy": "pbt",
        "genes": ["lr"],
        "fitness": {"num_samples": 16, "batch_size": 8},
        "tracking": {"directory": directory, "mlflow": False},
        "checkpoint": {"every_rounds": None},
    } | changes


def _attached(directory: str, optimizer_of: Any, **changes: Any) -> tuple[Any, Any, Any]:
    model = DistributedDataParallel(Net())
    optimizer = optimizer_of(list(model.parameters()))
    config, valid = _block(directory, **changes), datasets()[1]
    given = optimizer[0] if isinstance(optimizer, tuple) else optimizer
    return model, optimizer, clantune_scale.attach(model, given, config=config, eval_data=valid, micro_batch_size=MICRO)


def _train(model: Any, optimizer: Any, rank: int) -> torch.Tensor:
    for step in range(STEPS):
        model(*batch(step, 0, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _told(optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that an optimizer keeps, as plain data."""
    entries = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
    kept = [{k: v.tolist() if torch.is_tensor(v) else v for k, v in own.items()} for own in entries]
    return [kept, [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]]


def _gone_back_and_cloned(rank: int, directory: str) -> dict[str, Any]:
    clantune_scale.join(_block(directory))
    dist.init_process_group("gloo")
    found = {}
    for name, optimizer_of in OPTIMIZERS.items():
        model, optimizer, clan = _attached(directory, optimizer_of)
        start = Snapshot(clan.state())
        first = _train(model, optimizer, rank)
        start.restore(clan.state)
        fresh = _told(optimizer)
        again = _train(model, optimizer, rank)
        if rank == 1:
            start.restore(clan.state)  # Member 1 has no state now, and its donor has.
        clan.transfers.run(clan.state(), [0, 0])
        peers = world.current().replica_group
        cloned = peers.gather_json([_told(optimizer), [p.tolist() for p in model.parameters()]])
        if rank == 0:
            start.restore(clan.state)  # Now it is the donor that has none.
        clan.transfers.run(clan.state(), [0, 0])
        emptied = peers.gather_json(_told(optimizer))
        found[name] = {
            "same": torch.equal(first, again),
            "fresh": fresh[0],
            "cloned": cloned[0] == cloned[1],
            "kept": bool(cloned[0][0][0][0]),
            "emptied": emptied[0] == emptied[1] and emptied[0][0],
        }
        clan.finish()
    return found


def test_clones_and_ways_back_have_all_state_and_none_that_a_fresh_optimizer_lacks(tmp_path):
    for found in run_ranks(2, in_member_worlds, _gone_back_and_cloned, str(tmp_path)):
        for name in OPTIMIZERS:
            nothing: list[dict] = [{}] * 6
            assert found[name] == {
                "same": True, "fresh": nothing, "cloned": True, "kept": True, "emptied": nothing,
            }, name  # fmt: skip


def _measured(rank: int, directory: str) -> dict[str, Any]:
    """A schedule-free clan of a strategy that averages weights by itself."""
    clantune_scale.join(_block(directory))
    dist.init_process_group("gloo")
    changes = {"strategy": "clan", "round_length": STEPS, "fitness": {"num_samples": 64, "batch_size": 8}}
    model, optimizer, clan = _attached(directory, OPTIMIZERS["schedule-free"], **changes)
    _train(model, optimizer, rank)
    # A member may have taken another one's state since.
    measured = clan.fitness.mean[clan.progress.lineage[0].donors[clan.member]]
    optimizer.eval()
    model.eval()
    with torch.no_grad():
        losses = [model.module(*rows) for rows in torch.utils.data.DataLoader(datasets()[1], 8)]
    weights = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    optimizer.train()
    summary = clan.finish()
    saved = load_file(summary.artifacts["champion"]) if summary.champion == clan.member else weights
    return {
        "measured": float(measured),
        "by hand": float(torch.stack(losses).mean()),
        "saved": all(torch.allclose(saved[name], value, rtol=1e-6) for name, value in weights.items()),
        "mode": optimizer.param_groups[0]["is_training"],
    }


def test_a_schedule_free_optimizer_is_measured_and_saved_in_its_evaluation_mode(tmp_path):
    for found in run_ranks(2, in_member_worlds, _measured, str(tmp_path)):
        assert found["measured"] == pytest.approx(found["by hand"], rel=1e-5)
        assert found["saved"] and found["mode"]


def _sharded(parameters: list[Any]) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        # Importing the package compiles optimizers that it has beside this one, in a way that torch deprecates.
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, lr=0.1)


def _refused(rank: int, directory: str) -> dict[str, str]:
    clantune_scale.join(_block(directory))
    dist.init_process_group("gloo")

    def two(parameters: list[Any]) -> tuple[Any, Any]:
        return torch.optim.SGD(parameters[:3], lr=0.1), torch.optim.AdamW(parameters[3:], lr=0.1)

    kinds = {
        "sharded": _sharded,
        "list": lambda p: Counting(p, 0.01, "list"),
        "group": lambda p: Counting(p, 0.01, "group"),
        "global": lambda p: Counting(p, 0.01, "global"),
        "second": two,
    }
    said = {}
    for name, optimizer_of in kinds.items():
        try:
            model, optimizer, clan = _attached(directory, optimizer_of)
            model(*batch(0, 0, rank)).backward()
            for part in optimizer if isinstance(optimizer, tuple) else [optimizer]:
                part.step()
        except ClanError as error:
            said[name] = f"{type(error).__name__}: {error}"
        if name != "sharded":
            clan.detach()
    return said


def test_state_that_a_clone_would_leave_behind_is_refused_by_name(tmp_path):
    expected = {
        "sharded": "ConfigError: ZeroRedundancyOptimizer keeps the state of its AdamW in .optim",
        "list": "ConfigError: Counting keeps 'factors', a list, for each parameter, and a clone would not copy it",
        "group": "ConfigError: Counting keeps 'history', a Tensor, in a group, and a clone would not copy it",
        "global": "ConfigError: Counting keeps state for 'all', which is no parameter that trains",
        "second": "ConfigError: AdamW updates parameters of the model, and the clan does not know it: its state would "
        "stay behind when a member is cloned or rolled back. Pass all optimizers: attach(model, [SGD, AdamW]).",
    }
    for said in run_ranks(2, in_member_worlds, _refused, str(tmp_path)):
        assert said.keys() == expected.keys()
        for name, message in expected.items():
            assert message in said[name], name
