"""The loss scale of a plain loop: torch's ``GradScaler``, which looks for overflow in gradients before each step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from clantune_scale.errors import ClanError, ConfigError
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


class ScaledLoop:
    """The part of a loop's backend that knows by which scaler the loop takes its steps.

    Args:
        scaler: the loop's; None if it has none.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._has_stepped = False
        self._on_skip: Callable[[], None] | None = None

    def after_skip(self, callback: Callable[[], None]) -> None:
        """Calls back when the loop's scaler has skipped a step: its ``update`` comes, and no optimizer has stepped."""
        self._on_skip = callback

    def _note_scaling(self) -> None:
        """A step ends only after the scaler's ``update``, which is the last to change its state."""
        if not self._has_stepped and self._on_skip is not None:
            self._on_skip()
        self._has_stepped = False

    @property
    def may_skip_steps(self) -> bool:
        """Whether a step of the loop may update nothing, because scaled gradients overflowed."""
        return self._scaler is not None

    def loss_scale(self) -> Mapping[str, Any] | None:
        return None if self._scaler is None else scale_of(self._scaler)

    def set_loss_scale(self, state: Mapping[str, Any]) -> None:
        if self._scaler is None:
            raise ClanError(
                f"this loop does not scale the loss, so it cannot load the loss scale {dict(state)}. Train in bf16 or "
                f"fp32, or pass scaler=... to attach()."
            )
        set_scale(self._scaler, state)
