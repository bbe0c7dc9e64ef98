"""FSDP2 members: ``fully_shard`` on the member's mesh, tensor-parallel or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from clantune_scale.backends.torch.engine import LoopBackend
from clantune_scale.backends.torch.fsdp_sharing import ShardSharing
from clantune_scale.backends.torch.validation_gradients import SCALED, ShardGradients
from clantune_scale.errors import ConfigError
from clantune_scale.gradients.hooks import GradientGroups
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.engine_protocol import ValidationGradients


class FSDPBackend(LoopBackend):
    """A module to which ``fully_shard`` was applied inside the member's world.

    The optimizer updates the sharded parameters. FSDP2 makes the 16-bit weights of a mixed-precision policy from them
    at each gather, so a clone needs no update of the model's weights.

    Args:
        model, module, optimizer, scheduler, options: see :class:`LoopBackend`.
        is_line: whether members lie on a line, so that nothing is hooked and a mesh may have replicas of its own.

    Raises:
        ConfigError: for a way of sharding that a clan cannot run with.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        *,
        is_line: bool = False,
        **options: Any,
    ) -> None:
        self._parts: Sequence[FSDPModule] = [part for part in module.modules() if isinstance(part, FSDPModule)]
        # A submodule that is still gathered has parameters that the optimizer does not know.
        self._reshard()
        _refuse_unsupported(module, self._parts, is_line=is_line)
        super().__init__(model, module, optimizer, scheduler, is_line=is_line, **options)
        self._sharing: ShardSharing | None = None
        group = _param_groups(self._parts)[0]
        info = group.mesh_info
        self._shard_rank, self._num_shards = info.shard_mesh_rank, info.shard_mesh_size
        self.dp_group, self.dp_rank, self.dp_size = info.shard_process_group, info.shard_mesh_rank, info.shard_mesh_size
        if group._is_hsdp:  # replicas of the mesh read data of their own; _refuse_unsupported excludes tensor ranks
            self.dp_group, self.dp_rank, self.dp_size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        self.tp_size = dist.get_world_size() // self.dp_size
        self.tp_group = _tensor_group(self._parameters.all, self.tp_size)
        self.tp_rank = 0 if self.tp_group is None else dist.get_rank(self.tp_group)

    def _reshard(self) -> None:
        for part in self._parts:
            part.reshard()

    def refresh(self) -> None:
        """Drops gathered weights. A forward pass without a backward pass leaves outdated ones in the root module."""
        self._reshard()

    def _starts(self) -> Mapping[str, int] | None:
        """FSDP2 shards a parameter (or this tensor rank's part of it) by rows, with equally many for each rank."""
        names = {id(parameter): name for name, parameter in self._parameters.all}
        starts = {}
        for shard in (shard for group in _param_groups(self._parts) for shard in group.fsdp_params):
            if shard.fsdp_placement.dim != 0:
                return None
            num_rows, *rest = shard._orig_size
            rows_each = -(-num_rows // self._num_shards)
            starts[names[id(shard.sharded_param)]] = min(self._shard_rank * rows_each, num_rows) * math.prod(rest)
        return starts

    def validation_gradients(self) -> ValidationGradients | str:
        if self.may_skip_steps:
            return SCALED
        if self.tp_size > 1:
            return "under tensor parallelism a gradient may be a part of a sum, by parameter"
        trained = [parameter for _, parameter in self._parameters.trained]
        return ShardGradients(self._loss, trained, group=self.dp_group, num_copies=self.dp_size // self._num_shards)

    @contextmanager
    def exchanging(self, is_last: bool) -> Iterator[None]:
        """FSDP2 accumulates whole gradients until the last micro-batch and reduces their sum: one clan collective."""
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
        """Sets one hook on every FSDP module, because torch's setter does not reach nested modules."""
        self._probe = probe or self._probe
        self._sharing = ShardSharing(team, groups, self._probe, self._order)
        for part in self._parts:
            for group in _groups_of(part):
                before = group._all_reduce_hook
                part.set_all_reduce_hook(self._sharing.hook(group))
                self._undo.append(partial(part.set_all_reduce_hook, before))

    def _check_order(self) -> None:
        if self._sharing is not None:
            self._sharing.check_order(self.device, self.num_steps)


def data_parallel_size(module: torch.nn.Module, *, is_line: bool = False) -> int:
    """Ranks that read different samples in a module that ``fully_shard`` was applied to.

    Args:
        module: the user's.
        is_line: whether members lie on a line.

    Raises:
        ConfigError: for a way of sharding that a clan cannot run under.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    _refuse_unsupported(module, parts, is_line=is_line)
    group = _param_groups(parts)[0]
    return dist.get_world_size() if group._is_hsdp else int(group.mesh_info.shard_mesh_size)


def _groups_of(part: FSDPModule) -> list[Any]:
    """A module's parameter groups. Before 2.11, torch kept at most one."""
    state = part._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _param_groups(parts: Sequence[FSDPModule]) -> list[Any]:
    return [group for part in parts for group in _groups_of(part)]


def _refuse_unsupported(module: torch.nn.Module, parts: Sequence[FSDPModule], *, is_line: bool) -> None:
    """Refuses ways of sharding whose gradients or state this backend does not find."""
    groups = _param_groups(parts)
    if any(len(_groups_of(part)) > 1 for part in parts):
        raise ConfigError(
            "a module's parameters are sharded over several meshes (by a shard_placement_fn), and torch calls no hook "
            "for them. Apply fully_shard() separately to each submodule that has a mesh of its own."
        )
    for group in groups:
        if is_line:
            _refuse_odd_replicas(group)
        elif group._is_hsdp:
            raise ConfigError(
                f"{group._module_fqn or 'the model'} is sharded over a mesh of two dimensions (hybrid sharding). In a "
                f"clan the members are the replicas, and they are no dimension of a mesh. Give fully_shard() the "
                f"member's one data-parallel dimension, and raise population_size for more replicas. Members on the "
                f'line ("members": "line") take the mesh as it is.'
            )
        if group._all_reduce_hook is not None and not is_line:
            raise ConfigError(
                f"{group._module_fqn or 'the model'} has an all-reduce hook already, and FSDP2 accepts one for each "
                f"module. Remove it before attach()."
            )
    sharded = {id(shard.sharded_param) for group in groups for shard in group.fsdp_params}
    outside = next((n for n, p in module.named_parameters() if p.requires_grad and id(p) not in sharded), None)
    if outside is not None:
        raise ConfigError(
            f"{outside} trains, and fully_shard() was not applied to its module, so its gradient is not reduced. Apply "
            f"fully_shard() to the whole model last."
        )
    sizes = {len(dist.get_process_group_ranks(group.mesh_info.shard_process_group)) for group in groups}
    if len(sizes) > 1:
        raise ConfigError(
            f"the model's modules are sharded over meshes of {sorted(sizes)} ranks. Shard all of them over one mesh."
        )


def _refuse_odd_replicas(group: Any) -> None:
    info = group.mesh_info
    if group._is_hsdp and info.shard_mesh_size * info.replicate_mesh_size != dist.get_world_size():
        raise ConfigError(
            f"{group._module_fqn or 'the model'} has {info.replicate_mesh_size} replicas of {info.shard_mesh_size} "
            f"shards in a world of {dist.get_world_size()} ranks: hybrid sharding beside tensor parallelism was not "
            f"tried with a clan. Use one of the two."
        )


def _tensor_group(named: Sequence[tuple[str, torch.Tensor]], tp_size: int) -> Any:
    """The group over which tensor parallelism shards this replica; None without tensor parallelism.

    Raises:
        ConfigError: if FSDP2 does not use all ranks of the member, and tensor parallelism does not use the rest.
    """
    if tp_size == 1:
        return None
    for _, tensor in named:
        if isinstance(tensor, DTensor) and tensor.device_mesh.ndim == 2:
            return tensor.device_mesh.get_group(1)
    raise ConfigError(
        f"a member has {dist.get_world_size()} ranks and its model is sharded over {dist.get_world_size() // tp_size} "
        f"of them, without tensor parallelism over the rest. Give fully_shard() a mesh of all the member's ranks, or "
        f"parallelize_module() the other dimension."
    )
