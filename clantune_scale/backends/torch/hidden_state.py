"""Optimizer state that the clan would not find: it is refused by name, because a clone would leave it behind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from clantune_scale.errors import ConfigError

_REMEDY = "a clone would not copy it: only tensors and numbers are moved. Use another optimizer."


def require_own_state(parts: Sequence[torch.optim.Optimizer]) -> None:
    """Checks that no optimizer keeps its state in another one inside it.

    torch's ``ZeroRedundancyOptimizer`` does, and so do wrappers that average or look ahead.

    Args:
        parts: the loop's optimizers.

    Raises:
        ConfigError: if one does.
    """
    for part in parts:
        for name, inner in vars(part).items():
            if isinstance(inner, torch.optim.Optimizer) and inner.state is not part.state:
                raise ConfigError(
                    f"{type(part).__name__} keeps the state of its {type(inner).__name__} in .{name}, where the clan "
                    f"does not find it, and a clone would leave it behind. Pass the {type(inner).__name__} itself. To "
                    f"shard its state over ranks, use fully_shard() or DeepSpeed's ZeRO."
                )


def refuse_unknown_optimizers(parts: Sequence[torch.optim.Optimizer], module: torch.nn.Module) -> Callable[[], None]:
    """Has every optimizer that updates the module's parameters without the clan's knowledge refused as it steps.

    Args:
        parts: the optimizers that the clan knows.
        module: the member's.

    Returns:
        A function that takes the check away again.
    """
    known = {id(part) for part in parts}
    mine = {id(parameter) for parameter in module.parameters()}

    def before_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if id(optimizer) in known:
            return
        updated = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if any(id(parameter) in mine for parameter in updated):
            raise ConfigError(
                f"{type(optimizer).__name__} updates parameters of the model, and the clan does not know it: its state "
                f"would stay behind when a member is cloned or rolled back. Pass all optimizers: "
                f"attach(model, [{', '.join([*(type(part).__name__ for part in parts), type(optimizer).__name__])}])."
            )

    return register_optimizer_step_pre_hook(before_any_step).remove


def require_plain(owner: str, key: str, value: Any) -> None:
    """Checks that an entry of a parameter's state is a tensor, a number or None.

    Args:
        owner: the optimizer's class.
        key, value: of the entry.

    Raises:
        ConfigError: if it is something else.
    """
    if value is not None and not torch.is_tensor(value) and not isinstance(value, bool | int | float):
        raise ConfigError(f"{owner} keeps {key!r}, a {type(value).__name__}, for each parameter, and {_REMEDY}")


def require_known_keys(owner: str, state: Mapping[Any, Any], parameters: Collection[torch.Tensor]) -> None:
    """Checks that an optimizer keeps state for its parameters only.

    Args:
        owner: the optimizer's class.
        state: the optimizer's.
        parameters: all that it may update.

    Raises:
        ConfigError: if there is other state.
    """
    known = {id(parameter) for parameter in parameters}
    other = next((key for key, entries in state.items() if id(key) not in known and _matters(entries)), None)
    if other is not None:
        name = f"a tensor of shape {list(other.shape)}" if torch.is_tensor(other) else repr(other)
        raise ConfigError(f"{owner} keeps state for {name}, which is no parameter that trains, and {_REMEDY}")


def require_plain_groups(owner: str, groups: Sequence[Mapping[str, Any]]) -> None:
    """Checks that parameter groups hold no tensors but numbers: of a group, only numbers travel.

    Args:
        owner: the optimizer's class.
        groups: its parameter groups.

    Raises:
        ConfigError: if one holds a tensor of several elements, or a container with a tensor in it.
    """
    for group in groups:
        for key, value in group.items():
            if key != "params" and _has_arrays(value):
                raise ConfigError(f"{owner} keeps {key!r}, a {type(value).__name__}, in a group, and {_REMEDY}")


def _matters(entries: Any) -> bool:
    return bool(entries) if isinstance(entries, Mapping | list | tuple) else True


def _has_arrays(value: Any) -> bool:
    if torch.is_tensor(value):
        return value.numel() != 1
    if isinstance(value, Mapping):
        return any(torch.is_tensor(item) or _has_arrays(item) for item in value.values())
    # A tuple of one-element tensors (betas) is a setting, which genes and schedules write.
    return isinstance(value, list | tuple | set) and any(_has_arrays(item) for item in value)
