"""Weights of any layout and type: channels last, transposed, double, complex, and sparse gradients, in groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import clantune_scale
from clantune_scale.distributed import world
from clantune_scale.transfer import Snapshot
from tests.backends.small_runs import in_member_worlds
from tests.ranks import run_ranks

STEPS = 4


class Loss(nn.Module):
    """The mean squared output of ``body``, which is given the samples as they are."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.body(inputs) - 1).abs().square().mean()


def _channels_last() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)


def _transposed() -> nn.Module:
    body = nn.Linear(3, 4)
    body.weight = nn.Parameter(body.weight.detach().clone().t().contiguous().t())
    body.register_buffer("columns", torch.arange(12.0).view(3, 4)[:, 1:3])
    return body


class Rotation(nn.Module):
    """A complex weight, whose imaginary part matters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.tensor(0.5 + 0.25j))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.scale * (self.weight @ inputs.to(self.weight.dtype).T)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


Kind = tuple[Callable[[], nn.Module], Callable[..., torch.optim.Optimizer], Callable[[int], torch.Tensor]]
KINDS: dict[str, Kind] = {
    "channels last": (_channels_last, _adam, lambda n: torch.randn(n, 3, 6, 6)),
    "transposed": (_transposed, _adam, lambda n: torch.randn(n, 3)),
    "double": (lambda: nn.Linear(3, 4).double(), _adam, lambda n: torch.randn(n, 3).double()),
    "complex": (Rotation, _adam, lambda n: torch.randn(n, 3)),
    "sparse": (
        lambda: nn.Embedding(7, 3, sparse=True),
        lambda parameters: torch.optim.SparseAdam(list(parameters), lr=1e-2),
        lambda n: torch.randint(7, (n, 2)),
    ),
}


def _built(kind: str) -> tuple[DistributedDataParallel, torch.optim.Optimizer, torch.Tensor]:
    torch.manual_seed(0)
    body, optimizer_of, data_of = KINDS[kind]
    # BatchNorm's statistics are each rank's own, as they are in two members.
    model = DistributedDataParallel(Loss(body()), broadcast_buffers=False)
    return model, optimizer_of(model.parameters()), data_of(16)


def _bits(model: nn.Module) -> list[list[float]]:
    return [torch.view_as_real(p + 0j).flatten().tolist() for p in model.parameters()]


def _plain(rank: int) -> dict[str, list[list[float]]]:
    """Weights after data-parallel steps over all ranks."""
    dist.init_process_group("gloo")
    found = {}
    for kind in KINDS:
        model, optimizer, data = _built(kind)
        for step in range(STEPS):
            model(data[4 * rank + step : 4 * rank + step + 4]).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[kind] = _bits(model.module)
    return found


def _in_a_clan(rank: int, directory: str, transport: str) -> dict[str, Any]:
    """The same, each rank a member; then a clone into the other member, and the way back to before it."""
    block = {
        "population_size": 2,
        "round_length": 2,
        "strategy": "control",
        "fitness": {"num_samples": 16},
        "genes": ["lr"],
        "tracking": {"directory": directory, "mlflow": False},
        "checkpoint": {"every_rounds": None},
        "transfer": {"transport": transport, "directory": f"{directory}/files"},
    }
    clantune_scale.join(block)
    dist.init_process_group("gloo")
    found = {}
    for kind in KINDS:
        model, optimizer, data = _built(kind)
        fresh, before = [p.detach().clone() for p in model.parameters()], None
        clan = clantune_scale.attach(model, optimizer, config=block, eval_data=data, micro_batch_size=4)
        start = Snapshot(clan.state())
        step_data = [data[4 * rank + step : 4 * rank + step + 4] for step in range(STEPS)]
        for step in clan.steps(step_data, until=STEPS):
            for batch in step:
                model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        bits = _bits(model.module)
        if rank == 1:
            with torch.no_grad():
                for tensor in dict(clan.state().tensors).values():
                    tensor.mul_(3)
        before = Snapshot(clan.state())
        clan.transfers.run(clan.state(), [0, 0])
        peer = world.current().replica_group
        cloned = peer.gather_json([torch.view_as_real(t + 0j).tolist() for _, t in clan.state().tensors])
        before.restore(clan.state)
        back = all(torch.equal(a, b) for (_, a), (_, b) in zip(clan.state().tensors, before.tensors, strict=True))
        start.restore(clan.state)
        at_start = all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh, strict=True))
        left = len([entries for entries in optimizer.state.values() if entries])
        found[kind] = {"bits": bits, "cloned": cloned[0] == cloned[1], "back": back, "at_start": at_start, "left": left}
        clan.finish()
    return found


def test_they_train_as_in_plain_data_parallelism_and_their_state_is_cloned_and_goes_back(tmp_path):
    plain = run_ranks(2, in_member_worlds, _plain)[0]
    for found in run_ranks(2, in_member_worlds, _in_a_clan, str(tmp_path), "peer"):
        for kind in KINDS:
            assert found[kind]["bits"] == plain[kind], kind
            assert found[kind]["cloned"] and found[kind]["back"] and found[kind]["at_start"], kind
            assert found[kind]["left"] == 0, kind
