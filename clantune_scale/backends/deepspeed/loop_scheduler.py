"""A scheduler that a loop steps by itself, after each step of an engine that has none (Hugging Face's Trainer does)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clantune_scale.backends.torch.optimizers import after_call
from clantune_scale.gradients.hooks import replace_method
from clantune_scale.transfer import MemberState
from clantune_scale.transfer.state import merged, plain


def call_after_step(engine: Any, scheduler: Any, callback: Callable[[], None]) -> list[Callable[[], None]]:
    """Calls back after each optimizer step of the engine, and after the scheduler's step if there is one.

    A step whose scaled gradients overflowed is over at once: loops do not step their scheduler after it.

    Args:
        engine: DeepSpeed's.
        scheduler: of the loop, or None.
        callback: without arguments.

    Returns:
        What undoes it.
    """
    step = engine.step
    is_due = False

    def step_then_call(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_due
        before, skipped = engine.global_steps, engine.skipped_steps
        result = step(*args, **kwargs)
        if engine.global_steps > before:
            is_due = scheduler is not None and engine.skipped_steps == skipped
            if not is_due:
                callback()
        return result

    def call_if_due() -> None:
        nonlocal is_due
        if is_due:
            is_due = False
            callback()

    undo = [replace_method(engine, "step", step_then_call)]
    return undo if scheduler is None else [*undo, after_call(scheduler, "step", call_if_due)]


def with_scheduler(state: MemberState, scheduler: Any, param_groups: Callable[[], list[dict[str, Any]]]) -> MemberState:
    """Makes the loop's scheduler a part of a training state, in place; returns the state."""
    load = state.load_scalars
    rates = [float(group["lr"]) for group in param_groups()]
    state.scalars["schedule"] = {"scheduler": plain(scheduler.state_dict()), "rates": rates}

    def load_with_scheduler(scalars: Mapping[str, Any]) -> None:
        load({**scalars, "schedule": None})
        schedule = scalars.get("schedule")
        if schedule is not None:
            scheduler.load_state_dict(merged(scheduler.state_dict(), schedule["scheduler"]))
            for group, rate in zip(param_groups(), schedule["rates"], strict=True):
                group["lr"] = merged(group["lr"], rate)

    state.load_scalars = load_with_scheduler
    return state
