"""Diagnostics that members exchange at the end of a round, beside their losses: norms, drift, alignment, times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.gradients.elements import real_elements
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.view import ClanView

_BUCKET_ELEMENTS = 1 << 23
# Below this multiple of the median, a difference in evaluation time is noise.
_STRAGGLER = 1.5


@dataclass(frozen=True)
class Diagnostics:
    """One round's diagnostics, each [members] float64; nan if a member has no value.

    Attributes:
        learning_rate: of the first parameter group in the round's last step.
        gradient_norm: before clipping, in the round's last step.
        drift: ``||theta_i - mean theta|| / ||mean theta||`` over the clan, before any transfer.
        alignment: cosine of the member's own gradient with the clan's, in the last cooperative step.
        nonfinite_counts: micro-batches of the member whose loss, or else whose gradient, was not finite.
        evaluation_s: the member's slowest rank's seconds for its share of the window.
        training_loss: mean over the round's micro-batches.
    """

    learning_rate: np.ndarray
    gradient_norm: np.ndarray
    drift: np.ndarray
    alignment: np.ndarray
    nonfinite_counts: np.ndarray
    evaluation_s: np.ndarray
    training_loss: np.ndarray

    @property
    def clan_training_loss(self) -> float | None:
        """The members' mean; None if one of them saw no loss."""
        return _or_none(float(self.training_loss.mean()))

    def of(self, member: int) -> dict[str, Any]:
        """One member's diagnostics as plain data, None for a missing value."""
        named = {
            "gradient_norm": self.gradient_norm,
            "drift": self.drift,
            "alignment": self.alignment,
            "training_loss": self.training_loss,
        }
        plain: dict[str, Any] = {name: _or_none(values[member]) for name, values in named.items()}
        return plain | {"strikes": int(self.nonfinite_counts[member])}

    @property
    def straggler(self) -> dict[str, float] | None:
        """The slowest member, its seconds and the median's, if it took 1.5 times the median or more; else None."""
        slowest = int(np.argmax(self.evaluation_s))
        median = float(np.median(self.evaluation_s))
        if self.evaluation_s.size < 3 or self.evaluation_s[slowest] < _STRAGGLER * median:
            return None
        return {"member": slowest, "seconds": float(self.evaluation_s[slowest]), "median_s": median}


def gather_diagnostics(
    view: ClanView,
    probe: GradientProbe,
    *,
    learning_rate: float,
    evaluation_s: float,
    nonfinite_counts: int,
    losses: tuple[float, int],
) -> Diagnostics:
    """Every member's diagnostics on every rank; all ranks of the clan call it, before any transfer.

    Args:
        view: the clan on this rank.
        probe: measured the gradients of the round's last steps.
        learning_rate: of this member's first parameter group in the round's last step.
        evaluation_s: this rank's seconds for its share of the window.
        nonfinite_counts: micro-batches of this rank whose loss or gradient was not finite.
        losses: sum of the training losses of this rank's micro-batches in the round, and their number.
    """
    device, replica_group = view.backend.device, view.world.replica_group
    masters = view.backend.masters()
    alignment = probe.read_alignment(device)
    totals = torch.tensor([float(nonfinite_counts), *losses], dtype=torch.float64, device=device)
    slowest = torch.tensor(evaluation_s, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    total_nonfinite_counts, total_loss, count = totals.tolist()
    given = [
        learning_rate,
        probe.norm,
        drift_of(masters, replica_group, view.groups.replica_group_for(masters[0].device.type)),
        alignment,
        total_nonfinite_counts,
        float(slowest),
        total_loss / count if count else None,
    ]
    table = replica_group.gather(np.array([math.nan if value is None else value for value in given]))
    return Diagnostics(*table.T)


@torch.no_grad()
def drift_of(masters: Sequence[torch.Tensor], replica_group: ReplicaGroup, group: Any) -> float:
    """How far this member's weights are from the clan's mean weights, relative to the mean's norm.

    It costs one all-reduce of the fp32 weights across members, in buckets, and two sums over the member. Ranks that
    hold the same weights count them equally often in the numerator and in the denominator.

    Args:
        masters: this rank's fp32 weights.
        replica_group: this rank's peers.
        group: the same peers' group on the weights' device.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=masters[0].device)
    for bucket in _buckets(masters):
        own = torch.cat([real_elements(tensor) for tensor in bucket])
        mean = own / replica_group.size
        if replica_group.size > 1:
            dist.all_reduce(mean, group=group)
        sums += torch.stack([(own - mean).double().square().sum(), mean.double().square().sum()])
    dist.all_reduce(sums)
    distance, norm = sums.tolist()
    return math.sqrt(distance / norm) if norm > 0 else math.nan


def _buckets(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Joins neighbouring tensors up to a size; a larger tensor is a bucket of its own."""
    buckets: list[list[torch.Tensor]] = []
    room = 0
    for tensor in tensors:
        if tensor.numel() > room or not buckets:
            buckets.append([])
            room = _BUCKET_ELEMENTS
        buckets[-1].append(tensor.detach().contiguous())
        room -= tensor.numel()
    return buckets


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
