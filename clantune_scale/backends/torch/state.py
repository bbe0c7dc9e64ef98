"""The training state of a member whose optimizer updates the parameters directly: live local shards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from clantune_scale.backends.torch.hidden_state import require_plain, require_plain_groups
from clantune_scale.core.genome import GROUP_KEYS
from clantune_scale.errors import ConfigError
from clantune_scale.gradients.clip import local
from clantune_scale.transfer import MemberState
from clantune_scale.transfer.state import Piece, merged, plain

# A group's entries that genes, schedules and the clan set: they travel with a round, and not with a clone.
_SET = {key for key, _ in GROUP_KEYS.values()} | {"params", "initial_lr", "clantune_lr"}

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
    schedulers: Sequence[Any],
    refresh: Callable[[], None],
    starts: Callable[[], Mapping[str, int] | None],
) -> MemberState:
    """This rank's training state.

    Args:
        optimizer: its moments and step counts are part of the state; several are seen as one.
        trained: the parameters that it updates, by name: the fp32 masters.
        fixed: frozen parameters and buffers, by name.
        schedulers: of learning rates.
        refresh: updates the model's weights from the masters.
        starts: returns, by parameter, the index of the first element that this rank's shard holds (left out for 0), or
            None if a shard is not a contiguous slice.
    """
    require_plain_groups(_name_of(optimizer), optimizer.param_groups)
    return MemberState(
        tensors=list(_tensors(optimizer, trained, fixed)),
        scalars={"optimizer": _optimizer_scalars(optimizer, trained), "schedule": _schedule(optimizer, schedulers)},
        load_scalars=lambda scalars: _load(optimizer, trained, schedulers, scalars),
        refresh=refresh,
        logical=lambda: _pieces(optimizer, trained, fixed, starts()),
    )


def persistent_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers that are state, by name.

    A buffer that is not persistent is made again from what the model is given (a cache of rotary angles or of a mask).
    It may have another shape on every member.
    """
    caches = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    return [(name, buffer) for name, buffer in module.named_buffers() if name not in caches]


def _name_of(optimizer: InnerOptimizer) -> str:
    # Several optimizers that act as one say by name which they are.
    return str(getattr(optimizer, "name", type(optimizer).__name__))


def _tensors(optimizer: InnerOptimizer, trained: Named, fixed: Named) -> Iterator[tuple[str, torch.Tensor]]:
    for index, (_, parameter) in enumerate(trained):
        yield f"master.{index}", local(parameter)
        moments = optimizer.state.get(parameter, {})
        for key in sorted(moments):
            require_plain(_name_of(optimizer), key, moments[key])
            if torch.is_tensor(moments[key]) and not is_number(moments[key]):
                yield f"optimizer.{index}.{key}", local(moments[key])
    for name, tensor in fixed:
        yield f"fixed.{name}", local(tensor)


def _optimizer_scalars(optimizer: InnerOptimizer, trained: Named) -> dict[str, Any]:
    counts = [_counts(optimizer.state.get(parameter, {})) for _, parameter in trained]
    return {"counts": counts, "groups": [group_numbers(group) for group in optimizer.param_groups]}


def group_numbers(group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that an optimizer keeps in a parameter group: a step count, Prodigy's distance, a mode.

    What genes and schedules set is left out. Constants are among them and do no harm: they are equal everywhere.
    """
    own = {key: value for key, value in group.items() if key not in _SET}
    return {key: value for key, value in plain(own).items() if isinstance(value, int | float)}


def load_group_numbers(groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, float]]) -> None:
    """Puts back what :func:`group_numbers` found. A number that was not there yet is dropped again."""
    for group, numbers in zip(groups, saved, strict=True):
        for key in group_numbers(group).keys() - numbers.keys():
            del group[key]
        group.update({key: merged(group.get(key), value) for key, value in numbers.items()})


def is_number(value: torch.Tensor) -> bool:
    """Whether a tensor of an optimizer's state travels as a number: a step count, or a moment of a scalar weight."""
    # JSON represents no complex number.
    return value.dim() == 0 and not value.is_complex()


def _counts(entries: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in one parameter's optimizer state. torch keeps step counts in zero-dimensional tensors."""
    numbers = {}
    for name, value in entries.items():
        if isinstance(value, bool | int | float):
            numbers[name] = value
        elif torch.is_tensor(value) and is_number(value):
            numbers[name] = local(value).item()
    return numbers


def _schedule(optimizer: InnerOptimizer, schedulers: Sequence[Any]) -> dict[str, Any] | None:
    """The part of the schedulers' state that JSON represents. The rest (functions) is equal on all members."""
    if not any(hasattr(scheduler, "state_dict") for scheduler in schedulers):
        return None
    states = [plain(one.state_dict()) if hasattr(one, "state_dict") else None for one in schedulers]
    return {"schedulers": states, "rates": [float(g["lr"]) for g in optimizer.param_groups]}


def _load(optimizer: InnerOptimizer, trained: Named, schedulers: Sequence[Any], scalars: Mapping[str, Any]) -> None:
    for (_, parameter), counts in zip(trained, scalars["optimizer"]["counts"], strict=True):
        entries = optimizer.state.get(parameter, {})
        for name, count in counts.items():
            if torch.is_tensor(entries.get(name)):
                local(entries[name]).fill_(count)
            else:
                entries[name] = count
    load_group_numbers(optimizer.param_groups, scalars["optimizer"]["groups"])
    schedule = scalars.get("schedule")
    if schedule is None:
        return
    if len(schedulers) != len(schedule["schedulers"]):
        raise ConfigError(
            f"the saved state holds {len(schedule['schedulers'])} learning-rate schedules and the loop has "
            f"{len(schedulers)}. Make all schedulers before attach(), as many as before."
        )
    for scheduler, saved in zip(schedulers, schedule["schedulers"], strict=True):
        if saved is not None:
            scheduler.load_state_dict(merged(scheduler.state_dict(), saved))
    for group, learning_rate in zip(optimizer.param_groups, schedule["rates"], strict=True):
        group["lr"] = merged(group["lr"], learning_rate)


def grown_indices(names: Collection[str]) -> set[int]:
    """The trained parameters whose optimizer state is among the names of a saved state."""
    return {int(name.split(".")[1]) for name in names if name.startswith("optimizer.")}


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
