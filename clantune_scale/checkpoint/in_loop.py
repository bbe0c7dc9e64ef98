"""A clan's part of a checkpoint that the loop around it writes, with the engine's state in files of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from clantune_scale.checkpoint import fit
from clantune_scale.checkpoint.capture import copy_from, is_clans_own, numbers_of_clan
from clantune_scale.checkpoint.restore import Target, restore_numbers
from clantune_scale.core.rounds import Position
from clantune_scale.errors import CheckpointError
from clantune_scale.transfer import Snapshot

#: Version of the form.
SCHEMA = 1


def state_of(target: Target) -> dict[str, Any]:
    """What this rank adds to the engine's state between two optimizer steps: tensors in host memory, numbers, texts.

    Args:
        target: whose.
    """
    view, progress = target.view, target.progress
    return {
        "schema": SCHEMA,
        "settings": fit.settings_of(view),
        "clan": numbers_of_clan(view, progress, begun=True),
        "tensors": {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in target.state().tensors if is_clans_own(name)
        },
        "counters": view.backend.counters(),
        "accumulation": view.backend.accumulation,
        "round_losses": list(progress.losses.round_losses),
        "phase": _saved(progress.phase_snapshot),
        "rollback": _saved(progress.rollback_snapshot),
    }


@torch.no_grad()
def load_state(target: Target, saved: Mapping[str, Any]) -> Position:
    """Loads the result of :func:`state_of` into a clan whose engine has been loaded by the loop.

    Returns:
        Where the run goes on.

    Raises:
        CheckpointError: if it does not fit this launch.
    """
    view, progress = target.view, target.progress
    if saved.get("schema") != SCHEMA:
        raise CheckpointError(
            f"the clan's state has the form {saved.get('schema')!r}, and this version reads {SCHEMA}. Resume with the "
            f"version of clantune_scale that saved it."
        )
    fit.check_settings(saved["settings"], fit.settings_of(view), view.config.checkpoint.allow)
    restore_numbers(target, saved["clan"], range(view.config.population_size))
    live = {name: tensor for name, tensor in target.state().tensors if is_clans_own(name)}
    difference = fit.layout_difference(_layout(saved["tensors"]), _layout(live))
    if difference is not None:
        raise CheckpointError(
            f"the clan's state does not fit the model: {difference}. Use the model, optimizer and ranks that the run "
            f"was started with."
        )
    for name, tensor in live.items():
        tensor.copy_(saved["tensors"][name])
    if view.backend.accumulation != saved["accumulation"]:
        view.backend.accumulation = saved["accumulation"]
    view.backend.load_counters(saved["counters"])
    progress.losses.begin_round(*saved["round_losses"])
    progress.phase_snapshot = _loaded(saved["phase"])
    progress.rollback_snapshot = _loaded(saved["rollback"])
    return view.phases.position


def _layout(tensors: Mapping[str, torch.Tensor]) -> list[list[Any]]:
    return [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()]


def _saved(snapshot: Snapshot | None) -> dict[str, Any] | None:
    return None if snapshot is None else {"scalars": snapshot.scalars, "tensors": dict(snapshot.tensors)}


def _loaded(saved: Mapping[str, Any] | None) -> Snapshot | None:
    return None if saved is None else copy_from({"": saved}, "", saved["tensors"])
