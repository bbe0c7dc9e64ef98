"""The training state of a sharded loop: which elements lie where, what a schedule keeps, and what makes it anew."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from clantune_scale.backends.torch import FSDPBackend
from clantune_scale.transfer.state import Piece
from tests.backends.small_runs import MICRO, Net, batch, in_member_worlds
from tests.ranks import run_ranks


def _backend(model: torch.nn.Module, optimizer: Any, scheduler: Any = None) -> FSDPBackend:
    return FSDPBackend(model, model, optimizer, scheduler, micro_batch_size=MICRO)


def _pieces(rank: int) -> dict[str, tuple[list[Piece], torch.Tensor]]:
    dist.init_process_group("gloo")
    model = fully_shard(Net())
    model.last.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(*batch(0, 0, rank)).backward()
    optimizer.step()
    state = _backend(model, optimizer).state()
    pieces = state.logical()
    return {name: (pieces[name], tensor.clone()) for name, tensor in state.tensors}


def test_shards_say_which_elements_they_hold():
    """Three ranks cut 24 rows evenly and 8 into 3, 3 and 2; together they hold each element once."""
    found = run_ranks(3, in_member_worlds, _pieces)
    whole: dict[str, list[torch.Tensor]] = {}
    for ranks in zip(*(shards.values() for shards in found), strict=True):
        end = 0
        for pieces, tensor in ranks:
            (piece,) = pieces
            assert (piece.start, piece.offset, piece.length) == (end, 0, tensor.numel())
            end += tensor.numel()
        whole[piece.key] = [tensor.flatten() for _, tensor in ranks]
    shapes = {name: parameter.numel() for name, parameter in Net().named_parameters()}
    expected = {f"{kind}/{name}": shapes[name] for name in shapes for kind in ("master", "exp_avg", "exp_avg_sq")}
    expected = {key: size for key, size in expected.items() if not key.endswith("last.bias")}
    assert {key: sum(map(len, parts)) for key, parts in whole.items()} == expected | {"fixed.last.bias": 8}
    assert torch.equal(torch.cat(whole["fixed.last.bias"]), Net().last.bias)


def _move(rank: int) -> dict[str, Any]:
    """A state of three steps, scheduled, onto an optimizer that has not stepped."""
    dist.init_process_group("gloo")
    backends = []
    for num_steps in (3, 0):
        model = fully_shard(Net(seed=num_steps))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
        scheduler = torch.optim.lr_scheduler.SequentialLR(
            optimizer, [schedule, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)], milestones=[2]
        )
        for step in range(num_steps):
            model(*batch(step, 0, rank)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        backends.append((_backend(model, optimizer, scheduler), optimizer, scheduler))
    donor, recipient = (backend.state() for backend, *_ in backends)
    recipient.grow({name for name, _ in donor.tensors})
    recipient = backends[1][0].state()
    assert recipient.manifest() == donor.manifest()
    for (_, source), (_, target) in zip(donor.tensors, recipient.tensors, strict=True):
        target.copy_(source)
    recipient.load_scalars(donor.scalars)
    for backend, optimizer, scheduler in backends:
        backend.module(*batch(9, 0, rank)).backward()
        optimizer.step()
        scheduler.step()
    (first, one, schedule), (second, other, continued) = backends
    equal = all(torch.equal(a, b) for a, b in zip(first.masters(), second.masters(), strict=True))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (one, other)]
    return {"equal": equal, "rates": rates, "epochs": [schedule.last_epoch, continued.last_epoch]}


def test_a_state_that_was_moved_goes_on_as_its_source():
    for found in run_ranks(2, in_member_worlds, _move):
        assert found["equal"] and found["epochs"] == [4, 4]
        assert found["rates"][0] == found["rates"][1] < 1e-2
