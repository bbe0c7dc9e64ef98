"""Counts the collectives of a real clan, step by step, by wrapping torch.distributed's functions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import clantune_scale
from tests.backends.small_runs import Net
from tests.small_clans import datasets

#: Up to so many elements of 8 bytes a collective is a table of figures or a decision, which a plan leaves out; of
#: 4 and 2 bytes, a norm or a vote.
FEW = {8: 32, 4: 3, 2: 3, 1: 32}
ROUND = 6
Key = tuple[str, str, int]

_FULL_ARGUMENT = {
    "all_reduce": 0,
    "all_gather": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
    "broadcast": 0,
    "reduce": 0,
    "all_to_all_single": 0,
}
_NAMES = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}


class Odd(Net):
    """With sizes that have to be padded before they are sharded: 3 is no multiple of the degrees."""

    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs, targets) + self.shift.float().square().sum()


class Counted:
    """Elements by (operation, scope, bytes of an element) since it was emptied."""

    def __init__(self) -> None:
        self.elements: Counter[Key] = Counter()
        for name in _FULL_ARGUMENT:
            self._wrap(name)
        send = dist.ProcessGroup.send

        def counted_send(group: Any, tensors: list[torch.Tensor], *args: Any) -> Any:
            self._add("send", group, tensors)
            return send(group, tensors, *args)

        dist.ProcessGroup.send = counted_send

    def empty(self) -> dict[Key, int]:
        counted, self.elements = dict(self.elements), Counter()
        return counted

    def _wrap(self, name: str) -> None:
        function = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            positional = [*args, *(value for key, value in kwargs.items() if key != "group")]
            whole = positional[_FULL_ARGUMENT[name]]
            group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
            self._add(_NAMES.get(name, name), group, whole if isinstance(whole, list) else [whole])
            return function(*args, **kwargs)

        setattr(dist, name, counted)

    def _add(self, operation: str, group: Any, tensors: list[torch.Tensor]) -> None:
        elements, width = sum(tensor.numel() for tensor in tensors), tensors[0].element_size()
        is_json = tensors[0].dtype == torch.uint8 and operation != "send"
        if elements > FEW[width] and not is_json:
            self.elements[operation, _scope(group), width] += elements


def _scope(group: Any) -> str:
    """A member's groups are known to torch; the clan's stand alone, and only one kind holds all four ranks."""
    if group is None or group in dist.distributed_c10d._world.pg_map:
        return "member"
    return "clan" if group.size() == 4 else "replica_group"


def job(rank: int, config: dict) -> dict[str, Any]:
    """Three rounds of six steps; what each kind of step and the end of the second and third round sent."""
    counted = Counted()
    train, valid = datasets()
    model = Odd()
    sizes = [parameter.numel() for parameter in model.parameters()]
    engine, _, loader, _ = clantune_scale.initialize(
        model=model, model_parameters=model.parameters(), config=config, training_data=train, eval_data=valid
    )
    clan = engine.clan
    found: dict[str, Any] = {"sizes": sizes}
    batches = iter(loader)
    while engine.global_steps < 3 * ROUND:
        position = clan.phases.position
        counted.empty()
        before = engine.global_steps
        while engine.global_steps == before:
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            engine.backward(engine(*batch))
            engine.step()
        kind = position.phase.kind.value + ("_last" if position.ends_phase else "")
        kind += "_round_end" if position.ends_round else ""
        found[kind] = counted.empty()
    found["state_bytes"] = clan.state().num_bytes
    found["kept_bytes"] = sum(
        tensor.numel() * tensor.element_size() for _, tensor in clan.progress.rollback_snapshot.tensors
    )
    found["donors"] = [record.donors for record in clan.progress.lineage]
    found["member"] = clan.member
    found["averages"] = clan.strategy.uses_ema
    return found
