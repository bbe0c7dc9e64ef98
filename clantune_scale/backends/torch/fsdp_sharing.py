"""Averaging FSDP2's gradients over the clan: each shard over its replica group, overlapping with backward.

FSDP2 reduce-scatters a module's gradients inside the member as soon as backward has passed the module. It then calls
the module's all-reduce hook with this rank's shard, divided by the member's degree. The hook averages the shard over
the members that share gradients.

- On CUDA the hook runs on FSDP2's own all-reduce stream, and backward does not wait for that stream.
- On the CPU the collective is asynchronous if the shard's memory becomes the gradient (the reduction has the
  parameter's dtype, and nothing is accumulated). Backward waits for it at its end, so the gradients are complete when
  ``loss.backward()`` returns. In all other cases the hook waits for the collective.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Variable

from clantune_scale.gradients.hooks import GradientGroups
from clantune_scale.gradients.posting_order import PostingOrder
from clantune_scale.gradients.probe import GradientProbe


class ShardSharing:
    """The state that the hooks of all FSDP modules share.

    Args:
        team: returns the members that share gradients in the current step. This member is one of them.
        groups: the stand-alone groups that cross members.
        probe: compares the member's own gradient with the clan's, in the steps in which it is active.
        order: records the collectives that are posted.
    """

    def __init__(
        self,
        team: Callable[[], tuple[int, ...]],
        groups: GradientGroups,
        probe: GradientProbe,
        order: PostingOrder,
    ) -> None:
        self._team, self._groups, self._probe, self._order = team, groups, probe, order

    def hook(self, param_group: Any) -> Callable[[torch.Tensor], None]:
        """The all-reduce hook of one FSDP module."""

        @torch.no_grad()
        def all_reduce_hook(shard: torch.Tensor) -> None:
            team = self._team()
            if len(team) > 1:
                self._average(shard, team, param_group)

        return all_reduce_hook

    def _average(self, shard: torch.Tensor, team: tuple[int, ...], param_group: Any) -> None:
        # Copied before the mask, so that the probe sees what the member computed.
        own = shard.clone() if self._probe.is_active else None
        self._groups.weigh([shard], team)
        # Divided before the sum, so that a 16-bit sum over the clan overflows no sooner than one over the member.
        shard.div_(len(team))
        group = self._groups.replica_group(team)
        self._order.note(str(param_group._module_fqn), shard)
        if shard.is_cuda:
            dist.all_reduce(shard, group=group)
            # FSDP2 releases a buffer that it casts from. Without this its own stream could reuse the memory during the
            # sum.
            shard.record_stream(torch.cuda.current_stream())
        elif own is None and _becomes_gradient(shard, param_group):
            work = dist.all_reduce(shard, group=group, async_op=True)
            # Autograd runs the callback at the end of this backward pass, before loss.backward() returns.
            Variable._execution_engine.queue_callback(work.wait)
        else:
            dist.all_reduce(shard, group=group)
        if own is not None:
            self._probe.compare(own, shard)

    def check_order(self, device: torch.device, num_steps: int) -> None:
        """Compares what members posted, if they share gradients; see :meth:`PostingOrder.check_step`."""
        team = self._team()
        if len(team) > 1:
            group = partial(self._groups.replica_group, team)
            self._order.check_step(group, device, num_steps=num_steps, ends_phase=self._probe.is_active)


def _becomes_gradient(shard: torch.Tensor, param_group: Any) -> bool:
    """Whether FSDP2 makes the gradients views of the shard's memory and does not change it after the hook."""
    return (
        shard.dtype in (torch.float32, torch.bfloat16)
        and param_group.gradient_divide_factor is None
        and not getattr(param_group, "force_sum_reduction_for_comms", False)
        and all(_is_view(parameter, shard.dtype) for parameter in param_group.fsdp_params)
    )


def _is_view(fsdp_param: Any, dtype: torch.dtype) -> bool:
    parameter = fsdp_param.sharded_param
    return (
        parameter.dtype == dtype
        and parameter.grad is None
        and not fsdp_param.offload_to_cpu
        and not getattr(parameter, "_post_accumulate_grad_hooks", None)
    )
