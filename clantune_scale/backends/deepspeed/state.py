"""The training state of each DeepSpeed optimizer, and how its 16-bit weights are made from the masters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank

from clantune_scale.backends.deepspeed import pieces
from clantune_scale.backends.torch.hidden_state import require_known_keys, require_plain, require_plain_groups
from clantune_scale.backends.torch.optimizers import has_modes
from clantune_scale.backends.torch.refusals import require_only_trained
from clantune_scale.backends.torch.state import (
    group_numbers,
    is_number,
    load_group_numbers,
    persistent_buffers,
)
from clantune_scale.errors import ConfigError
from clantune_scale.transfer import MemberState
from clantune_scale.transfer.state import Piece, grow_optimizer, merged, plain

_COUNTERS = ("global_steps", "micro_steps", "global_samples", "skipped_steps")
_LOSS_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_MASTERS: dict[str, Callable[[Any], list[torch.Tensor]]] = {
    "DeepSpeedZeroOptimizer": lambda optimizer: list(optimizer.single_partition_of_fp32_groups),
    "DeepSpeedZeroOptimizer_Stage3": lambda optimizer: list(optimizer.fp32_partitioned_groups_flat),
    "BF16_Optimizer": lambda optimizer: list(optimizer.fp32_groups_flat_partition),
    "FP16_Optimizer": lambda optimizer: list(optimizer.fp32_groups_flat),
    "FP16_UnfusedOptimizer": lambda optimizer: [master for group in optimizer.fp32_groups for master in group],
}


def optimizer_kind(engine: Any) -> str:
    """The class name of DeepSpeed's wrapper, or "plain" if the user's optimizer updates the parameters directly.

    Raises:
        ConfigError: for a wrapper whose state this version does not find.
    """
    if engine.optimizer is engine.basic_optimizer:
        return "plain"
    kind = type(engine.optimizer).__name__
    if kind not in _MASTERS:
        raise ConfigError(
            f"DeepSpeed wraps the optimizer in {kind}, and the clan cannot move its state. "
            f"Use one of {', '.join(_MASTERS)} (ZeRO 0 to 3 in fp32, bf16 or fp16)."
        )
    return kind


def masters(engine: Any) -> list[torch.Tensor]:
    """This rank's live fp32 weights. They are also the keys of the inner optimizer's state."""
    kind = optimizer_kind(engine)
    if kind == "plain":
        return [parameter for group in _trained(engine) for parameter in group]
    return _MASTERS[kind](engine.optimizer)


def note_trained(engine: Any) -> None:
    """Notes which parameters train. If one is frozen later, it stands still and remains a master."""
    groups = engine.basic_optimizer.param_groups
    engine.clantune_trained = {id(p) for group in groups for p in group["params"] if p.requires_grad}
    engine.clantune_num_groups = len(groups)
    engine.clantune_frozen = {name for name, p in engine.module.named_parameters() if not p.requires_grad}


def _trained(engine: Any) -> list[list[torch.Tensor]]:
    """[groups] the parameters that trained when it was noted."""
    if not hasattr(engine, "clantune_trained"):
        note_trained(engine)
    known = engine.clantune_trained
    return [[p for p in group["params"] if id(p) in known] for group in engine.basic_optimizer.param_groups]


def _frozen(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Those that did not, by name."""
    if not hasattr(engine, "clantune_frozen"):
        note_trained(engine)
    return [(name, p) for name, p in engine.module.named_parameters() if name in engine.clantune_frozen]


def require_trained(engine: Any) -> None:
    """Checks that an update by the user's own optimizer changes only parameters that trained when a clan was attached.

    Raises:
        ConfigError: if it changes another one. DeepSpeed's wrappers leave it alone.
    """
    if optimizer_kind(engine) == "plain":
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        groups, count = engine.basic_optimizer.param_groups, engine.clantune_num_groups
        require_only_trained(groups, engine.clantune_trained, names, num_groups=count)


def in_update(engine: Any) -> list[bool]:
    """[masters] whether the next update changes each. DeepSpeed's wrappers give all of their masters a gradient."""
    is_plain = optimizer_kind(engine) == "plain"
    return [not is_plain or master.grad is not None for master in masters(engine)]


def groups_of_masters(engine: Any) -> list[int]:
    """[masters] the index of each one's parameter group."""
    kind = optimizer_kind(engine)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return [int(engine.optimizer.sub_group_to_group_id[place]) for place in range(len(masters(engine)))]
    if kind in ("plain", "FP16_UnfusedOptimizer"):
        return [index for index, group in enumerate(_trained(engine)) for _ in group]
    return list(range(len(masters(engine))))


@torch.no_grad()
def gradient_norm(engine: Any) -> float:
    """The member's gradient norm if the user's optimizer updates the parameters directly. Shared parts count once.

    When DeepSpeed clips these gradients in a pipeline, it uses the norm of the first stage only.
    """
    mpu = engine.mpu
    is_first = bwc_tensor_model_parallel_rank(mpu) == 0
    counted = [
        parameter.grad
        for parameter in engine.module.parameters()
        if parameter.grad is not None
        and not getattr(parameter, "ds_pipe_replicated", False)
        and (is_first or is_model_parallel_parameter(parameter))
    ]
    squares = torch.zeros(1, dtype=torch.float64, device=engine.device)
    if counted:
        squares += torch.nn.utils.get_total_norm(counted).double() ** 2
    if mpu is not None:
        dist.all_reduce(squares, group=mpu.get_model_parallel_group())
    return math.sqrt(squares.item())


@torch.no_grad()
def refresh(engine: Any) -> None:
    """Writes the masters into the weights that the model computes with (a member collective)."""
    kind, optimizer = optimizer_kind(engine), engine.optimizer
    if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        optimizer.update_lp_params()
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        # A parameter that is still gathered would silently keep the old weights.
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
    elif kind == "FP16_Optimizer":
        for half, full in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
            half.copy_(full)
    elif kind == "FP16_UnfusedOptimizer":
        for halves, fulls in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            torch._foreach_copy_([half.data for half in halves], list(fulls))


@contextmanager
def without_trace(engine: Any) -> Iterator[None]:
    """Keeps ZeRO 3 from recording the forward passes inside.

    ZeRO 3 records the order of parameters in its first passes, and decides by it for good when to release a parameter.
    A trace of forward passes without backward passes (the evaluation before the first step) would make every training
    step gather half as many parameters again. A trace that training has completed also fits evaluation, so it stays.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None or offload.get_param_coordinator().is_complete_trace():
        yield
        return

    def forget(*_: Any) -> None:
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    handle = engine.module.register_forward_hook(forget)
    try:
        yield
    finally:
        handle.remove()


def member_state(engine: Any) -> MemberState:
    """This rank's training state: masters, moments, frozen parameters, buffers; step counts, loss scale, schedule."""
    inner = engine.basic_optimizer
    require_plain_groups(type(inner).__name__, inner.param_groups)
    updated = [parameter for group in inner.param_groups for parameter in group["params"]]
    require_known_keys(type(inner).__name__, inner.state, [*masters(engine), *updated])
    return MemberState(
        tensors=list(_tensors(engine)),
        scalars={"optimizer": _optimizer_scalars(engine), "schedule": _schedule_scalars(engine)},
        load_scalars=lambda scalars: _load_scalars(engine, scalars),
        refresh=lambda: refresh(engine),
        grow=lambda names: _grow(engine, names),
        logical=lambda: _logical(engine),
        reread=lambda: member_state(engine),
    )


def _logical(engine: Any) -> dict[str, list[Piece]] | None:
    """The pieces of every tensor of the state; None if they are unknown."""
    keys = masters(engine)
    cut = pieces.master_pieces(engine, keys)
    if cut is None:
        return None
    frozen = {f"frozen.{name}": parameter for name, parameter in _frozen(engine)}
    found = {}
    for name, tensor in _tensors(engine):
        kind, _, rest = name.partition(".")
        if kind == "frozen":
            found[name] = pieces.frozen_pieces(rest, frozen[name])
        elif kind == "buffer" or tensor.numel() != keys[int(rest.partition(".")[0])].numel():
            found[name] = pieces.whole(name, tensor)
        else:
            index, _, moment = rest.partition(".")
            found[name] = [replace(piece, key=f"{moment or 'master'}/{piece.key}") for piece in cut[int(index)]]
    return found


def _grow(engine: Any, names: Collection[str]) -> None:
    """Makes optimizer state for exactly the masters whose state is among ``names`` (see ``MemberState.grow``)."""
    wanted = {int(name.split(".")[1]) for name in names if name.startswith("optimizer.")}
    keys, inner = masters(engine), engine.basic_optimizer
    with _all_masters(engine):
        grow_optimizer(inner, keys, wanted)


@contextmanager
def _all_masters(engine: Any) -> Iterator[None]:
    """Inside, the inner optimizer's groups hold all of its masters."""
    if optimizer_kind(engine) != "DeepSpeedZeroOptimizer_Stage3":
        yield
        return
    # ZeRO 3 gives the optimizer one master at a time, and none between steps.
    groups, places = engine.basic_optimizer.param_groups, engine.optimizer.sub_group_to_group_id
    hidden = [group["params"] for group in groups]
    for index, group in enumerate(groups):
        group["params"] = [key for place, key in enumerate(masters(engine)) if places[place] == index]
    try:
        yield
    finally:
        for group, params in zip(groups, hidden, strict=True):
            group["params"] = params


@contextmanager
def inference_weights(engine: Any) -> Iterator[None]:
    """Inside, the optimizer is in its evaluation mode, if it has one, and the model holds the weights of that mode."""
    inner = engine.basic_optimizer
    if not has_modes(inner):
        yield
        return
    with _all_masters(engine):
        inner.eval()
    refresh(engine)
    try:
        yield
    finally:
        with _all_masters(engine):
            inner.train()
        refresh(engine)


def counters(engine: Any) -> dict[str, int]:
    """DeepSpeed's own counters."""
    return {name: int(getattr(engine, name)) for name in _COUNTERS}


def load_counters(engine: Any, saved: Mapping[str, int]) -> None:
    """Loads the result of :func:`counters`."""
    for name in _COUNTERS:
        setattr(engine, name, saved[name])


def _tensors(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    state = engine.basic_optimizer.state
    for index, master in enumerate(masters(engine)):
        yield f"master.{index}", master.data
        moments = state.get(master, {})
        for name in sorted(moments):
            require_plain(type(engine.basic_optimizer).__name__, name, moments[name])
            if torch.is_tensor(moments[name]) and not is_number(moments[name]):
                yield f"optimizer.{index}.{name}", moments[name]
    for name, parameter in _frozen(engine):
        yield f"frozen.{name}", parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data
    for name, buffer in persistent_buffers(engine.module):
        yield f"buffer.{name}", buffer.data


def _optimizer_scalars(engine: Any) -> dict[str, Any]:
    inner = engine.basic_optimizer
    counts = [_counts(inner.state.get(master, {})) for master in masters(engine)]
    groups = [group_numbers(group) for group in inner.param_groups]
    return {"counts": counts, "groups": groups, "loss_scale": loss_scale(engine)}


def _counts(entries: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in one master's optimizer state, one-element tensors as numbers."""
    return {
        name: value.item() if torch.is_tensor(value) else value
        for name, value in entries.items()
        if isinstance(value, bool | int | float) or (torch.is_tensor(value) and is_number(value))
    }


def _schedule_scalars(engine: Any) -> dict[str, Any] | None:
    """The part of the scheduler's state that JSON represents. The rest is equal on all members."""
    scheduler = engine.lr_scheduler
    if scheduler is None or not hasattr(scheduler, "state_dict"):
        return None
    groups = engine.basic_optimizer.param_groups
    learning_rates = [{"lr": group["lr"]} if "lr" in group else {} for group in groups]
    return {"scheduler": plain(scheduler.state_dict()), "rates": plain({"": learning_rates})[""]}


def _load_scalars(engine: Any, scalars: Mapping[str, Any]) -> None:
    inner = engine.basic_optimizer
    optimizer_scalars = scalars["optimizer"]
    for master, counts in zip(masters(engine), optimizer_scalars["counts"], strict=True):
        entries = inner.state.get(master, {})
        for name, count in counts.items():
            if torch.is_tensor(entries.get(name)):
                entries[name].fill_(count)
            else:
                entries[name] = count
    load_group_numbers(inner.param_groups, optimizer_scalars["groups"])
    if optimizer_scalars["loss_scale"] is not None:
        set_loss_scale(engine, optimizer_scalars["loss_scale"])
    schedule = scalars.get("schedule")
    if schedule is not None:
        engine.lr_scheduler.load_state_dict(merged(engine.lr_scheduler.state_dict(), schedule["scheduler"]))
        for group, saved in zip(inner.param_groups, schedule["rates"], strict=True):
            group.update({key: merged(group.get(key), value) for key, value in saved.items()})


def _scaler(engine: Any) -> Any | None:
    """The object with the loss scale, which DeepSpeed's optimizers keep by different names; None without one."""
    if not engine.fp16_enabled():
        return None
    holders = (getattr(engine.optimizer, name, None) for name in ("loss_scaler", "loss_scale_config"))
    return next((holder for holder in holders if hasattr(holder, "cur_scale")), None)


def loss_scale(engine: Any) -> dict[str, float] | None:
    """The dynamic loss scale's state; None if the loss is not scaled."""
    holder = _scaler(engine)
    if holder is None:
        return None
    return {name: getattr(holder, name) for name in _LOSS_SCALE_FIELDS if hasattr(holder, name)}


def set_loss_scale(engine: Any, state: Mapping[str, float]) -> None:
    """Loads the result of :func:`loss_scale`."""
    holder = _scaler(engine)
    for name, value in state.items():
        setattr(holder, name, value)
