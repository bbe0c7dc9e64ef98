"""FSDP2 members: ``fully_shard`` on the member's mesh, tensor-parallel or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from clantune_scale.backends.torch.engine import LoopBackend
from clantune_scale.backends.torch.fsdp_sharing import ShardSharing
from clantune_scale.errors import ConfigError
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.engine_protocol import GradientGroups


class FSDPBackend(LoopBackend):
    """A module to which ``fully_shard`` was applied inside the member's world.

    The sharded parameters are what the optimizer updates: 16-bit weights of a mixed-precision policy are made
    from them whenever they are gathered, so that nothing has to be brought up to date after a clone.

    Args:
        model, module, optimizer, scheduler, options: as :class:`LoopBackend` takes them.

    Raises:
        ConfigError: for a way of sharding that a clan cannot run under.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        **options: Any,
    ) -> None:
        self._parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
        # A part that is still gathered shows parameters that the optimizer does not know.
        self._reshard()
        _refuse_unsupported(module, self._parts)
        super().__init__(model, module, optimizer, scheduler, **options)
        info = _param_groups(self._parts)[0].mesh_info
        self.dp_group, self.dp_rank, self.dp_size = info.shard_process_group, info.shard_mesh_rank, info.shard_mesh_size
        self.tp_size = dist.get_world_size() // self.dp_size
        self.tp_group = _tensor_group(self._trained + self._frozen, self.tp_size)
        self.tp_rank = 0 if self.tp_group is None else dist.get_rank(self.tp_group)

    def _reshard(self) -> None:
        for part in self._parts:
            part.reshard()

    def refresh(self) -> None:
        """Drops gathered weights: a forward pass without a backward one leaves the root's behind, out of date."""
        self._reshard()

    def _starts(self) -> Mapping[str, int] | None:
        """FSDP2 cuts a parameter (or this tensor rank's part of it) into as many rows for each rank."""
        names = {id(parameter): name for name, parameter in self._trained + self._frozen}
        starts = {}
        for shard in (shard for group in _param_groups(self._parts) for shard in group.fsdp_params):
            if shard.fsdp_placement.dim != 0:
                return None
            num_rows, *rest = shard._orig_size
            rows_each = -(-num_rows // self.dp_size)
            starts[names[id(shard.sharded_param)]] = min(self.dp_rank * rows_each, num_rows) * math.prod(rest)
        return starts

    @contextmanager
    def exchanging(self, is_last: bool) -> Iterator[None]:
        """FSDP2 keeps whole gradients until the last micro-batch, and reduces their sum: one clan collective."""
        self._set_sync(is_last)
        try:
            yield
        finally:
            self._set_sync(True)

    def _set_sync(self, is_on: bool) -> None:
        for part in self._parts:
            part.set_requires_gradient_sync(is_on, recurse=False)

    def share_gradients(
        self,
        team: Callable[[], tuple[int, ...]],
        groups: GradientGroups,
        probe: GradientProbe | None = None,
    ) -> None:
        """One stateful hook on every FSDP module: torch's setter does not go down to those inside."""
        self._probe = probe or self._probe
        self._sharing = ShardSharing(team, groups, self._probe, self._order)
        for part in self._parts:
            for group in _groups_of(part):
                before = group._all_reduce_hook
                part.set_all_reduce_hook(self._sharing.hook(group))
                self._undo.append(lambda part=part, before=before: part.set_all_reduce_hook(before))

    def _check_order(self) -> None:
        self._sharing.check_order(self.device)


def data_parallel_size(module: torch.nn.Module) -> int:
    """Ranks that read different samples in a module that ``fully_shard`` was applied to.

    Raises:
        ConfigError: for a way of sharding that a clan cannot run under.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    _refuse_unsupported(module, parts)
    return int(_param_groups(parts)[0].mesh_info.shard_mesh_size)


def _groups_of(part: FSDPModule) -> list[Any]:
    """A module's parameter groups; torch before 2.11 keeps one at most."""
    state = part._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _param_groups(parts: list[FSDPModule]) -> list[Any]:
    return [group for part in parts for group in _groups_of(part)]


def _refuse_unsupported(module: torch.nn.Module, parts: list[FSDPModule]) -> None:
    """Ways of sharding under which gradients or state lie where this backend does not look."""
    groups = _param_groups(parts)
    if any(len(_groups_of(part)) > 1 for part in parts):
        raise ConfigError(
            "a module's parameters are sharded over several meshes (a shard_placement_fn gives each its own), and "
            "torch calls no hook for those. Apply fully_shard() to each part with a mesh of its own."
        )
    for group in groups:
        if group._is_hsdp:
            raise ConfigError(
                f"{group._module_fqn or 'the model'} is sharded over a mesh of two dimensions (hybrid sharding). A "
                f"member is the replica in a clan, whose members are no dimension of a mesh: give fully_shard() the "
                f"member's one data-parallel dimension, and raise population_size for more replicas."
            )
        if group._all_reduce_hook is not None:
            raise ConfigError(
                f"{group._module_fqn or 'the model'} has an all-reduce hook already, and FSDP2 keeps one for each "
                f"module. Remove it before attach()."
            )
    sharded = {id(shard.sharded_param) for group in groups for shard in group.fsdp_params}
    outside = next((n for n, p in module.named_parameters() if p.requires_grad and id(p) not in sharded), None)
    if outside is not None:
        raise ConfigError(
            f"{outside} trains and lies in no part that fully_shard() was applied to, so that no gradient of it is "
            f"reduced. Apply fully_shard() to the whole model last."
        )
    sizes = {dist.get_process_group_ranks(group.mesh_info.shard_process_group)[0:].__len__() for group in groups}
    if len(sizes) > 1:
        raise ConfigError(
            f"parts of the model are sharded over meshes of {sorted(sizes)} ranks. Shard all of them over one."
        )


def _tensor_group(named: list[tuple[str, torch.Tensor]], tp_size: int) -> Any:
    """The group over which tensor parallelism splits this replica; None where it does not.

    Raises:
        ConfigError: if the ranks that FSDP2 leaves over are in no mesh of the model's.
    """
    if tp_size == 1:
        return None
    for _, tensor in named:
        if isinstance(tensor, DTensor) and tensor.device_mesh.ndim == 2:
            return tensor.device_mesh.get_group(1)
    raise ConfigError(
        f"a member has {dist.get_world_size()} ranks and its model is sharded over {dist.get_world_size() // tp_size} "
        f"of them, with no tensor parallelism over the rest. Give fully_shard() a mesh of all the member's ranks, or "
        f"parallelize_module() the other dimension."
    )
