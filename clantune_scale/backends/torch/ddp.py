"""DDP members: every rank holds the whole model, and gradients are averaged in buckets during backward."""

# No postponed annotations here: DDP checks the types of its communication hook and does not resolve strings.
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clantune_scale.backends.torch.engine import LoopBackend
from clantune_scale.backends.torch.used import UsedInClan
from clantune_scale.backends.torch.validation_gradients import SCALED, ReplicaGradients
from clantune_scale.errors import ConfigError
from clantune_scale.gradients.hooks import GradientGroups
from clantune_scale.gradients.posting_order import PostingOrder
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.engine_protocol import ValidationGradients


class DDPBackend(LoopBackend):
    """A ``DistributedDataParallel`` whose process group is the member.

    Args:
        model: what the loop calls.
        ddp: the DDP module in it.
        optimizer, scheduler, options: see :class:`LoopBackend`.

    Raises:
        ConfigError: if DDP averages over another group than the member's, or has a communication hook of the user's.
    """

    tp_rank = 0
    tp_size = 1

    def __init__(
        self,
        model: torch.nn.Module,
        ddp: DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        **options: Any,
    ) -> None:
        _refuse_unsupported(ddp)
        super().__init__(model, getattr(ddp.module, "_orig_mod", ddp.module), optimizer, scheduler, **options)
        self._ddp = ddp
        self._sharing: BucketSharing | None = None
        self.dp_group, self.dp_rank, self.dp_size = ddp.process_group, dist.get_rank(), dist.get_world_size()

    def exchanging(self, is_last: bool) -> AbstractContextManager[None]:
        """DDP's own ``no_sync`` around all micro-batches but the last."""
        return nullcontext() if is_last else self._ddp.no_sync()

    def validation_gradients(self) -> ValidationGradients | str:
        if self.may_skip_steps:
            return SCALED
        if self._ddp.static_graph:
            return "DistributedDataParallel with static_graph=True counts every forward pass with gradients"
        trained = [parameter for _, parameter in self._parameters.trained]
        return ReplicaGradients(self._loss, trained, dp_group=self.dp_group, dp_size=self.dp_size, ddp=self._ddp)

    def share_gradients(
        self,
        team: Callable[[], tuple[int, ...]],
        groups: GradientGroups,
        probe: GradientProbe | None = None,
    ) -> None:
        """Registers one communication hook for good, as DDP accepts no second one. It reads the team in each step."""
        self._probe = probe or self._probe
        self._sharing = BucketSharing(self._ddp, team, groups, self._probe, self._order)
        self._ddp.register_comm_hook(self._sharing, average_bucket)
        self._undo.append(self._sharing.stay_in_member)

    def _check_order(self) -> None:
        if self._sharing is not None:
            self._sharing.check_order(self.device, self.num_steps)


class BucketSharing:
    """What the communication hook reads.

    Args:
        ddp: the member's, over all its ranks.
        team: returns the members that share gradients in the current step. This member is one of them.
        groups: the stand-alone groups that cross members.
        probe: compares the member's own gradient with the clan's, in the steps in which it is active.
        order: records the collectives that are posted.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        team: Callable[[], tuple[int, ...]],
        groups: GradientGroups,
        probe: GradientProbe,
        order: PostingOrder,
    ) -> None:
        self.member_group, self.probe, self.order = ddp.process_group, probe, order
        self.used = UsedInClan(ddp)
        self._team, self._groups = team, groups
        self._is_in_member = False

    @property
    def is_sharing(self) -> bool:
        """Whether gradients cross members in the current step."""
        return not self._is_in_member and len(self._team()) > 1

    @property
    def group(self) -> Any:
        """The ranks over which gradients are averaged in the current step."""
        return self._groups.gradient(self._team()) if self.is_sharing else self.member_group

    def weigh(self, gradients: torch.Tensor) -> None:
        """Applies the non-finite mask to this rank's term of the sum, in place."""
        self._groups.weigh([gradients], self._team())

    def stay_in_member(self) -> None:
        """Stops sharing for good. DDP cannot remove a hook, so the hook then averages inside the member."""
        self._is_in_member = True

    def check_order(self, device: torch.device, num_steps: int) -> None:
        """Compares what ranks posted, if they share gradients; see :meth:`PostingOrder.check_step`."""
        if self.is_sharing:
            self.order.check_step(lambda: self.group, device, num_steps=num_steps, ends_phase=self.probe.is_active)


def average_bucket(sharing: BucketSharing, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: the mean of one bucket over the member, or over all members that share gradients.

    It posts the same asynchronous collective as plain data parallelism over those ranks. DDP waits for all of them at
    the end of backward.

    Args:
        sharing: what the hook reads.
        bucket: DDP's, averaged in place.
    """
    gradients, group = bucket.buffer(), sharing.group
    own = None
    if sharing.is_sharing:
        # Noted at the moment of posting: buckets of equal size would be mixed without an error if orders differ.
        sharing.order.note(f"{bucket.index()} {sharing.used.places(bucket)}", gradients)
        if sharing.probe.is_active:
            own = gradients / sharing.member_group.size()
            dist.all_reduce(own, group=sharing.member_group)
        # After the probe's copy, so that the probe sees what the member computed.
        sharing.weigh(gradients)
    # DDP without a hook multiplies by the reciprocal. A division by three would round differently.
    gradients.mul_(1.0 / group.size())
    if sharing.is_sharing:
        sharing.used.note(bucket, group)
    work = dist.all_reduce(gradients, group=group, async_op=True)
    if own is not None:
        work.wait()
        sharing.probe.compare(own, gradients)
    return work.get_future().then(lambda done: done.value()[0])


def _refuse_unsupported(ddp: DistributedDataParallel) -> None:
    """Refuses DDP over another group than the member, and DDP that has a communication hook."""
    ranks = dist.get_process_group_ranks(ddp.process_group)
    if ranks != list(range(dist.get_world_size())):
        raise ConfigError(
            f"DDP averages over the ranks {ranks} of a member that has {dist.get_world_size()}. Leave process_group "
            f"out: in a clan, DDP's default group is the member."
        )
    if getattr(ddp, "_comm_hooks", None):
        names = ", ".join(hook.__name__ for hook, _ in ddp._comm_hooks)
        raise ConfigError(
            f"DDP has a communication hook already ({names}) and accepts one only. Remove it. The clan's hook averages "
            f"gradients in their own dtype."
        )
    if getattr(ddp, "mixed_precision", None) is not None:
        raise ConfigError(
            "DDP's mixed precision registers a communication hook of its own, and the clan needs that place. Use "
            "torch.autocast, or FSDP2 with a MixedPrecisionPolicy."
        )
