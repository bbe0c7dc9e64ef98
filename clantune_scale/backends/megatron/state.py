"""The training state of Megatron-core's optimizers, and how the model's weights are made from the masters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from clantune_scale.backends.torch.optimizers import schedulers_in
from clantune_scale.backends.torch.state import member_state as plain_state
from clantune_scale.backends.torch.state import persistent_buffers
from clantune_scale.transfer import MemberState
from clantune_scale.transfer.state import grow_optimizer

_SCALE = {"cur_scale": "_scale", "growth_tracker": "_growth_tracker", "hysteresis_tracker": "_hysteresis_tracker"}


def wrappers(optimizer: Any) -> list[Any]:
    """Megatron's wrappers of torch's optimizers, without those that hold no parameter of this rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def masters(optimizer: Any) -> list[torch.Tensor]:
    """This rank's live fp32 weights (its shards with the distributed optimizer), the keys of the inner state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def refresh(model: Any, optimizer: Any) -> None:
    """Writes the masters into the weights that the model computes with (a member collective)."""
    for wrapper in wrappers(optimizer):
        if hasattr(wrapper, "_copy_main_params_to_model_params"):
            wrapper._copy_main_params_to_model_params()
    if model.ddp_config.use_distributed_optimizer:
        for buckets in model.bucket_groups + model.expert_parallel_bucket_groups:
            # A gather that is under way brings old weights. This call waits for it, and the next one gathers anew.
            if buckets.param_gather_handle is not None:
                buckets.start_param_sync(force_sync=True)
        model.start_param_sync(force_sync=True)


class _Inner:
    """The torch optimizers inside Megatron's wrappers, seen as one."""

    def __init__(self, optimizer: Any) -> None:
        self._parts = [wrapper.optimizer for wrapper in wrappers(optimizer)]
        self.param_groups = optimizer.param_groups
        self.state: Any = self

    def get(self, parameter: torch.Tensor, default: Any) -> Any:
        """The state that ``parameter``'s optimizer keeps for it."""
        return next((part.state[parameter] for part in self._parts if parameter in part.state), default)


class _Schedule:
    """Megatron's scheduler, whose values all follow from its number of steps."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self._scheduler.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # Megatron's own load_state_dict adds the saved steps to the present ones.
        self._scheduler.num_steps = state["num_steps"]
        # The class's method: the instance's is hooked and would count this as the end of a step.
        type(self._scheduler).step(self._scheduler, 0)


def member_state(model: Any, module: torch.nn.Module, optimizer: Any, scheduler: Any) -> MemberState:
    """This rank's training state: masters, moments, frozen parameters, buffers; step counts, loss scale, schedule.

    Args:
        model: Megatron's ``DistributedDataParallel``.
        module: the model inside it.
        optimizer: Megatron's.
        scheduler: its scheduler, or None.
    """
    trained = [(str(index), master) for index, master in enumerate(masters(optimizer))]
    fixed: list[tuple[str, torch.Tensor]] = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
    fixed += persistent_buffers(module)
    schedulers = [_Schedule(scheduler)] if hasattr(scheduler, "num_steps") else schedulers_in(scheduler)
    state = plain_state(
        _Inner(optimizer),
        trained,
        fixed,
        schedulers,
        lambda: refresh(model, optimizer),
        starts=lambda: None,
    )
    # The distributed optimizer's shards do not map to parameters, so a resume needs the same number of ranks.
    state.logical = None
    state.scalars["optimizer"]["loss_scale"] = loss_scale(optimizer)
    load_plain = state.load_scalars

    def load(scalars: Mapping[str, Any]) -> None:
        load_plain(scalars)
        if scalars["optimizer"]["loss_scale"] is not None:
            set_loss_scale(optimizer, scalars["optimizer"]["loss_scale"])

    state.load_scalars = load
    state.grow = lambda names: _grow(optimizer, names)
    state.reread = lambda: member_state(model, module, optimizer, scheduler)
    return state


def _grow(optimizer: Any, names: Collection[str]) -> None:
    """Makes optimizer state for exactly the masters whose state is among ``names`` (see ``MemberState.grow``)."""
    wanted = {int(name.split(".")[1]) for name in names if name.startswith("optimizer.")}
    places = {id(master): index for index, master in enumerate(masters(optimizer))}
    for wrapper in wrappers(optimizer):
        mine = [parameter for group in wrapper.param_groups for parameter in group["params"]]
        grow_optimizer(wrapper.optimizer, mine, {i for i, key in enumerate(mine) if places[id(key)] in wanted})


def random_streams() -> dict[str, torch.Tensor]:
    """The states of the random streams that Megatron's layers draw from under tensor parallelism."""
    states = get_cuda_rng_tracker().get_states()
    return {
        name: (state.get_state() if isinstance(state, torch.Generator) else state).clone()
        for name, state in states.items()
    }


def load_random_streams(streams: Mapping[str, torch.Tensor]) -> None:
    """Loads the result of :func:`random_streams`."""
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    for name, saved in streams.items():
        if isinstance(states.get(name), torch.Generator):
            states[name].set_state(saved)
        else:
            states[name] = saved.clone()
    tracker.set_states(states)


def _scalers(optimizer: Any) -> Sequence[Any]:
    """The objects with a dynamic loss scale. Each of several chained optimizers has its own."""
    scalers = (getattr(wrapper, "grad_scaler", None) for wrapper in wrappers(optimizer))
    return [scaler for scaler in scalers if hasattr(scaler, "_growth_tracker")]


def loss_scale(optimizer: Any) -> dict[str, float] | None:
    """The dynamic loss scale's state; None without a loss scale or with a constant one."""
    scalers = _scalers(optimizer)
    if not scalers:
        return None
    return {name: float(getattr(scalers[0], attribute)) for name, attribute in _SCALE.items()}


def set_loss_scale(optimizer: Any, state: Mapping[str, float]) -> None:
    """Loads the result of :func:`loss_scale`."""
    for scaler in _scalers(optimizer):
        scaler._scale = torch.full_like(scaler._scale, state["cur_scale"])
        scaler._growth_tracker = int(state["growth_tracker"])
        scaler._hysteresis_tracker = int(state["hysteresis_tracker"])
