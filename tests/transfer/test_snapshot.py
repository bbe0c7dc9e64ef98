"""Snapshots in host memory: taken into the memory of the one before, and restored as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clantune_scale.transfer import MemberState, Snapshot


class Reader:
    """Stands for a thread that writes a snapshot to disk."""


def state_of(*tensors: torch.Tensor) -> MemberState:
    named = [(f"master.{index}", tensor) for index, tensor in enumerate(tensors)]
    return MemberState(named, {"optimizer": {}}, lambda scalars: None, lambda: None)


def places(snapshot: Snapshot) -> list[int]:
    return [tensor.data_ptr() for _, tensor in snapshot.tensors]


def test_a_snapshot_is_taken_into_the_memory_of_the_one_that_it_replaces():
    live = state_of(torch.zeros(5), torch.zeros(3, 2, dtype=torch.bfloat16))
    first = Snapshot(live)
    where = places(first)
    for value in (1.0, 2.0, 3.0):
        for _, tensor in live.tensors:
            tensor.fill_(value)
        first = Snapshot(live, first)
        assert places(first) == where
        assert all(bool((tensor == value).all()) for _, tensor in first.tensors)
    assert not set(where) & {tensor.data_ptr() for _, tensor in live.tensors}


def test_nothing_is_left_in_the_one_that_was_given_up():
    live = state_of(torch.zeros(5))
    first = Snapshot(live)
    Snapshot(live, first)
    assert first.tensors == []


@pytest.mark.parametrize("other", [torch.zeros(6), torch.zeros(5, dtype=torch.float64)], ids=["shape", "dtype"])
def test_memory_that_does_not_fit_is_not_used(other):
    first = Snapshot(state_of(torch.zeros(5)))
    second = Snapshot(state_of(other + 1), first)
    assert torch.equal(second.tensors[0][1], other + 1)


def test_memory_that_is_read_from_stays_as_it_is():
    live = state_of(torch.zeros(5))
    first = Snapshot(live)
    reader: Any = Reader()
    first.lend(reader)
    read = dict(first.tensors)
    live.tensors[0][1].fill_(1.0)
    second = Snapshot(live, first)
    assert float(read["master.0"].sum()) == 0.0 and float(second.tensors[0][1].sum()) == 5.0
    where = places(second)
    second.lend(reader)
    del reader
    assert places(Snapshot(live, second)) == where


class Counts(torch.optim.Optimizer):
    """State that starts at the weights, and a number; zero is the right start of neither."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                own = self.state[p]
                if not own:
                    own.update(z=p.detach().clone(), weight=10.0)
                own["z"] -= self.param_groups[0]["lr"] * p.grad
                own["weight"] += 1.0
                p.copy_(own["z"] / own["weight"])


def test_before_the_first_step_there_is_what_a_new_optimizer_has():
    from clantune_scale.backends.torch.plain import PlainBackend

    def two_steps(model, optimizer):
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = Counts(list(model.parameters()))
    backend = PlainBackend(model, model, optimizer, micro_batch_size=1)
    before = Snapshot(backend.state())
    wanted = two_steps(model, optimizer)
    after = Snapshot(backend.state())
    before.restore(backend.state)
    assert not optimizer.state.get(model.weight)
    assert all(torch.equal(a, b) for a, b in zip(two_steps(model, optimizer), wanted, strict=True))
    before.restore(backend.state)
    # And state that was dropped is made again.
    after.restore(backend.state)
    assert torch.equal(model.weight, wanted[0]) and optimizer.state[model.weight]["weight"] == 12.0
