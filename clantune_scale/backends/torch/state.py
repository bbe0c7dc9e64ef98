"""What training continues from where the user's own optimizer steps on the parameters: local shards, all live."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from clantune_scale.errors import ConfigError
from clantune_scale.transfer import MemberState
from clantune_scale.transfer.state import Piece, grow_optimizer, local, merged, plain

Named = Sequence[tuple[str, torch.Tensor]]


def member_state(
    optimizer: torch.optim.Optimizer,
    trained: Named,
    fixed: Named,
    scheduler: Any,
    refresh: Callable[[], None],
    starts: Callable[[], Mapping[str, int] | None],
) -> MemberState:
    """This rank's training state.

    Args:
        optimizer: whose moments and step counts are in it.
        trained: the parameters that it updates, by name: the fp32 masters.
        fixed: frozen parameters and buffers, by name.
        scheduler: a learning-rate scheduler, or None.
        refresh: brings the model's weights up to date with the masters.
        starts: by parameter, the first of its elements that this rank's shard holds, 0 where left out; or None where
            a shard is no stretch of elements.
    """
    return MemberState(
        tensors=list(_tensors(optimizer, trained, fixed)),
        scalars={"optimizer": _optimizer_scalars(optimizer, trained), "schedule": _schedule(optimizer, scheduler)},
        load_scalars=lambda scalars: _load(optimizer, trained, scheduler, scalars),
        refresh=refresh,
        grow=lambda names: _grow(optimizer, trained, names),
        logical=lambda: _pieces(optimizer, trained, fixed, starts()),
    )


def _tensors(optimizer: torch.optim.Optimizer, trained: Named, fixed: Named) -> Iterator[tuple[str, torch.Tensor]]:
    for index, (_, parameter) in enumerate(trained):
        yield f"master.{index}", local(parameter)
        moments = optimizer.state.get(parameter, {})
        for key in sorted(moments):
            _require_plain(optimizer, key, moments[key])
            if torch.is_tensor(moments[key]) and moments[key].dim() > 0:
                yield f"optimizer.{index}.{key}", local(moments[key])
    for name, tensor in fixed:
        yield f"fixed.{name}", local(tensor)


def _require_plain(optimizer: torch.optim.Optimizer, key: str, value: Any) -> None:
    """Refuses state that lies deeper than one tensor or number: it would stay behind when a member is cloned."""
    if value is None or torch.is_tensor(value) or isinstance(value, bool | int | float):
        return
    raise ConfigError(
        f"{type(optimizer).__name__} keeps {key!r}, a {type(value).__name__}, for each parameter, and a clone would "
        f"train on without it: tensors and numbers are moved, nothing that holds them. Use another optimizer."
    )


def _optimizer_scalars(optimizer: torch.optim.Optimizer, trained: Named) -> dict[str, Any]:
    counts = [_counts(optimizer.state.get(parameter, {})) for _, parameter in trained]
    return {"counts": counts, "group_steps": [group.get("step") for group in optimizer.param_groups]}


def _counts(entries: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in one parameter's state: torch keeps step counts in tensors without dimensions."""
    numbers = {}
    for name, value in entries.items():
        if isinstance(value, bool | int | float):
            numbers[name] = value
        elif torch.is_tensor(value) and value.dim() == 0:
            numbers[name] = local(value).item()
    return numbers


def _schedule(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any] | None:
    """The scheduler's state as far as JSON holds it; what it does not hold (functions) is the same everywhere."""
    if scheduler is None or not hasattr(scheduler, "state_dict"):
        return None
    return {"scheduler": plain(scheduler.state_dict()), "rates": [float(g["lr"]) for g in optimizer.param_groups]}


def _load(optimizer: torch.optim.Optimizer, trained: Named, scheduler: Any, scalars: Mapping[str, Any]) -> None:
    for (_, parameter), counts in zip(trained, scalars["optimizer"]["counts"], strict=True):
        entries = optimizer.state.get(parameter, {})
        for name in _counts(entries):
            # What the other side does not have yet (it has not stepped) begins at zero.
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
    for group, rate in zip(optimizer.param_groups, schedule["rates"], strict=True):
        group["lr"] = merged(group["lr"], rate)


def _grow(optimizer: torch.optim.Optimizer, trained: Named, names: Collection[str]) -> None:
    """Optimizer state for exactly the parameters that have some among ``names`` (see ``MemberState.grow``)."""
    wanted = {int(name.split(".")[1]) for name in names if name.startswith("optimizer.")}
    grow_optimizer(optimizer, [parameter for _, parameter in trained], wanted)


def _pieces(
    optimizer: torch.optim.Optimizer, trained: Named, fixed: Named, starts: Mapping[str, int] | None
) -> dict[str, list[Piece]] | None:
    """Which elements of which parameter each tensor of the state holds (see ``MemberState.logical``)."""
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
                # A moment of another shape than its parameter (a factored one) is cut by rules of its own.
                return None
            key, start = f"{moment or kind}/{owner}", starts.get(owner, 0)
        found[name] = [Piece(key, start, 0, tensor.numel())]
    return found
