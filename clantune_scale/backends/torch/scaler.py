"""The loss scale of a plain loop: torch's ``GradScaler``, which looks for overflow in gradients before each step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from clantune_scale.errors import ConfigError
from clantune_scale.transfer import MemberState


def require_known_scaler(parts: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler | None) -> None:
    """Checks, inside an optimizer's first step, that no scaler but the given one made the step.

    An optimizer is not told who steps it. A scaler keeps the optimizers that it steps, so that it can be found.

    Args:
        parts: the loop's optimizers.
        scaler: that was given to ``attach``.

    Raises:
        ConfigError: if there is another.
    """
    mine = {id(part) for part in parts}
    for found in gc.get_objects():
        # type(), because some objects answer isinstance() by importing what they stand for.
        is_scaler = issubclass(type(found), torch.amp.GradScaler)
        if is_scaler and found is not scaler and mine & found._per_optimizer_states.keys():
            raise ConfigError(
                "a GradScaler steps the optimizer, and the clan does not know it: its overflow would be hidden, and "
                "its scale would not be saved. Pass it: attach(..., scaler=scaler)."
            )


def scale_of(scaler: torch.amp.GradScaler) -> dict[str, float]:
    """The state of a scaler."""
    return {"cur_scale": float(scaler.get_scale()), "growth_tracker": float(scaler._get_growth_tracker())}


def set_scale(scaler: torch.amp.GradScaler, state: Mapping[str, Any]) -> None:
    """Loads the result of :func:`scale_of`."""
    own = scaler.state_dict()
    own |= {"scale": state["cur_scale"], "_growth_tracker": int(state["growth_tracker"])}
    scaler.load_state_dict(own)


def with_scale(
    state: MemberState, read: Callable[[], Mapping[str, Any] | None], write: Callable[[Mapping[str, Any]], None]
) -> None:
    """Makes the loss scale a part of a training state, in place."""
    state.scalars["optimizer"]["loss_scale"] = read()
    load = state.load_scalars

    def load_with_scale(scalars: Mapping[str, Any]) -> None:
        load(scalars)
        write(scalars["optimizer"]["loss_scale"])

    state.load_scalars = load_with_scale
