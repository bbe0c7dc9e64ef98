"""The training state of a member whose optimizer updates the parameters directly: live local shards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from clantune_scale.errors import ConfigError
from clantune_scale.gradients.clip import local
from clantune_scale.transfer import MemberState
from clantune_scale.transfer.state import Piece, grow_optimizer, merged, plain

Named = Sequence[tuple[str, torch.Tensor]]


class InnerOptimizer(Protocol):
    """What the state of an optimizer is read from: torch's own, or several that are seen as one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    @property
    def state(self) -> Any: ...


def member_state(
    optimizer: InnerOptimizer,
    trained: Named,
    fixed: Named,
    scheduler: Any,
    refresh: Callable[[], None],
    starts: Callable[[], Mapping[str, int] | None],
) -> MemberState:
    """This rank's training state.

    Args:
        optimizer: its moments and step counts are part of the state. Megatron's backend passes several seen as one.
        trained: the parameters that it updates, by name: the fp32 masters.
        fixed: frozen parameters and buffers, by name.
        scheduler: a learning-rate scheduler, or None.
        refresh: updates the model's weights from the masters.
        starts: returns, by parameter, the index of the first element that this rank's shard holds (left out for 0), or
            None if a shard is not a contiguous slice.
    """
    return MemberState(
        tensors=list(_tensors(optimizer, trained, fixed)),
        scalars={"optimizer": _optimizer_scalars(optimizer, trained), "schedule": _schedule(optimizer, scheduler)},
        load_scalars=lambda scalars: _load(optimizer, trained, scheduler, scalars),
        refresh=refresh,
        grow=lambda names: _grow(optimizer, trained, names),
        logical=lambda: _pieces(optimizer, trained, fixed, starts()),
    )


def _tensors(optimizer: InnerOptimizer, trained: Named, fixed: Named) -> Iterator[tuple[str, torch.Tensor]]:
    for index, (_, parameter) in enumerate(trained):
        yield f"master.{index}", local(parameter)
        moments = optimizer.state.get(parameter, {})
        for key in sorted(moments):
            _require_plain(optimizer, key, moments[key])
            if torch.is_tensor(moments[key]) and moments[key].dim() > 0:
                yield f"optimizer.{index}.{key}", local(moments[key])
    for name, tensor in fixed:
        yield f"fixed.{name}", local(tensor)


def _require_plain(optimizer: InnerOptimizer, key: str, value: Any) -> None:
    """Refuses optimizer state that is no tensor and no number. A clone would not copy it."""
    if value is None or torch.is_tensor(value) or isinstance(value, bool | int | float):
        return
    raise ConfigError(
        f"{type(optimizer).__name__} keeps {key!r}, a {type(value).__name__}, for each parameter, and a clone would "
        f"not copy it: only tensors and numbers are moved. Use another optimizer."
    )


def _optimizer_scalars(optimizer: InnerOptimizer, trained: Named) -> dict[str, Any]:
    counts = [_counts(optimizer.state.get(parameter, {})) for _, parameter in trained]
    return {"counts": counts, "group_steps": [group.get("step") for group in optimizer.param_groups]}


def _counts(entries: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in one parameter's optimizer state. torch keeps step counts in zero-dimensional tensors."""
    numbers = {}
    for name, value in entries.items():
        if isinstance(value, bool | int | float):
            numbers[name] = value
        elif torch.is_tensor(value) and value.dim() == 0:
            numbers[name] = local(value).item()
    return numbers


def _schedule(optimizer: InnerOptimizer, scheduler: Any) -> dict[str, Any] | None:
    """The part of the scheduler's state that JSON represents. The rest (functions) is equal on all members."""
    if scheduler is None or not hasattr(scheduler, "state_dict"):
        return None
    return {"scheduler": plain(scheduler.state_dict()), "rates": [float(g["lr"]) for g in optimizer.param_groups]}


def _load(optimizer: InnerOptimizer, trained: Named, scheduler: Any, scalars: Mapping[str, Any]) -> None:
    for (_, parameter), counts in zip(trained, scalars["optimizer"]["counts"], strict=True):
        entries = optimizer.state.get(parameter, {})
        for name in _counts(entries):
            # An optimizer that has not stepped has no state to send. Its counts are zero.
            if torch.is_tensor(entries[name]):
                local(entries[name]).fill_(counts.get(name, 0))
            else:
                entries[name] = counts.get(name, 0)
    for group, step in zip(optimizer.param_groups, scalars["optimizer"]["group_steps"], strict=True):
        if step is not None:
            group["step"] = step
    schedule = scalars.get("schedule")
    if schedule is None:
        return
    scheduler.load_state_dict(merged(scheduler.state_dict(), schedule["scheduler"]))
    for group, learning_rate in zip(optimizer.param_groups, schedule["rates"], strict=True):
        group["lr"] = merged(group["lr"], learning_rate)


def _grow(optimizer: InnerOptimizer, trained: Named, names: Collection[str]) -> None:
    """Makes optimizer state for exactly the parameters whose state is among ``names`` (see ``MemberState.grow``)."""
    assert isinstance(optimizer, torch.optim.Optimizer), "several optimizers as one grow theirs one by one"
    wanted = {int(name.split(".")[1]) for name in names if name.startswith("optimizer.")}
    grow_optimizer(optimizer, [parameter for _, parameter in trained], wanted)


def _pieces(
    optimizer: InnerOptimizer, trained: Named, fixed: Named, starts: Mapping[str, int] | None
) -> dict[str, list[Piece]] | None:
    """The elements of the parameters that each tensor of the state holds (see ``MemberState.logical``)."""
    if starts is None:
        return None
    found = {}
    for name, tensor in _tensors(optimizer, trained, fixed):
        kind, _, rest = name.partition(".")
        if kind == "fixed":
            key, start = name, starts.get(rest, 0)
        else:
            index, _, moment = rest.partition(".")
            owner, parameter = trained[int(index)]
            if tensor.numel() != local(parameter).numel():
                # A moment that is shaped differently from its parameter (a factored one) is sharded differently too.
                return None
            key, start = f"{moment or kind}/{owner}", starts.get(owner, 0)
        found[name] = [Piece(key, start, 0, tensor.numel())]
    return found
