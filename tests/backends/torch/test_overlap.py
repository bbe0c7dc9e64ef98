"""The clan's collectives are under way while backward goes on: a trace of one step on gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import clantune_scale
from clantune_scale.errors import DivergenceError
from tests.backends.families import Setup, ddp, fsdp
from tests.backends.families.loops import MICRO, Loop
from tests.backends.small_runs import in_member_worlds
from tests.ranks import run_ranks


def _block(directory: str) -> dict:
    return {
        "population_size": 2,
        "strategy": "control",
        "fitness": {"num_samples": 16, "batch_size": 8},
        "tracking": {"directory": directory, "mlflow": False, "print_every_steps": 1000},
    }


class Trace:
    """The order of events on one rank, from :meth:`begin` on."""

    def __init__(self, clan: Any) -> None:
        self.events: list[str] = []
        self._groups = (clan.groups.replica_group((0, 1)), clan.groups.gradient((0, 1)))
        self._all_reduce = dist.all_reduce

    def begin(self) -> None:
        dist.all_reduce = self._noted

    def end(self) -> list[str]:
        dist.all_reduce = self._all_reduce
        return self.events

    def note_gradient(self, _: Any, args: Any, output: torch.Tensor) -> None:
        """A forward hook: backward has come to this layer when its output has a gradient."""
        output.register_hook(lambda gradient: self.events.append("first layer"))

    def _noted(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        work = self._all_reduce(tensor, *args, **kwargs)
        # The only synchronous collective is that of the non-finite mask, a number per member.
        if work is None or kwargs.get("group") not in self._groups:
            return work
        self.events.append("posted")
        return Waited(work, self.events)


class Waited:
    """A collective's handle that notes when it is waited for."""

    def __init__(self, work: Any, events: list[str]) -> None:
        self._work, self._events = work, events

    def wait(self) -> Any:
        self._events.append("waited")
        return self._work.wait()

    def get_future(self) -> Any:
        return self._work.get_future()


def _traced(rank: int, name: str, directory: str) -> list[str]:
    module = {"fsdp": fsdp, "ddp": ddp}[name]
    run: Loop = module.start(Setup(), _block(directory))
    # The first step is DDP's with one bucket, after which it makes the buckets anew.
    run.train(2)
    trace = Trace(run.clan)
    inner = run.clan.backend.module
    (inner.token if name == "fsdp" else inner.first).register_forward_hook(trace.note_gradient)
    inputs = module.datasets()[0][:MICRO]
    loss = run.model(*inputs)
    trace.begin()
    loss.backward()
    trace.events.append("backward is over")
    return trace.end()


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_gradients_are_on_their_way_before_backward_ends(name, tmp_path):
    for events in run_ranks(2, in_member_worlds, _traced, name, str(tmp_path)):
        posted = [place for place, event in enumerate(events) if event == "posted"]
        assert len(posted) >= 2
        assert posted[-1] < events.index("backward is over") == len(events) - 1
        # What later layers know is under way before the first layer's gradient exists.
        assert posted[0] < events.index("first layer")
        # FSDP2 does not wait by itself: the clan does, once everything is posted. DDP does.
        waited = [place for place, event in enumerate(events) if event == "waited"]
        assert (len(waited), min(waited, default=len(events)) > posted[-1]) == (name == "fsdp" and len(posted), True)


class Swapped(torch.nn.Module):
    """Two layers of one size, which member 1 goes through the other way round."""

    def __init__(self, is_swapped: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        self._is_swapped = is_swapped

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        first, second = reversed(self.layers) if self._is_swapped else self.layers
        return second(torch.tanh(first(inputs))).square().mean()


def _in_different_orders(rank: int, directory: str) -> str:
    world = clantune_scale.join(2)
    dist.init_process_group("gloo")
    model = Swapped(world.member == 1)
    for layer in model.layers:
        fsdp.fully_shard(layer)
    fsdp.fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    clan = clantune_scale.attach(model, optimizer, config=_block(directory), eval_data=data, micro_batch_size=4)
    try:
        for step in clan.steps(clan.loader(data), until=1):
            for batch in step:
                model(batch).backward()
            optimizer.step()
    except DivergenceError as error:
        return str(error)
    return ""


def test_members_that_average_in_different_orders_are_told(tmp_path):
    for message in run_ranks(2, in_member_worlds, _in_different_orders, str(tmp_path)):
        assert "different orders in a step of this phase (this rank posted 2 collectives" in message
