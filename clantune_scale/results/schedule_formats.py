"""A schedule in other formats: CSV, and DeepSpeed's schedulers as far as they can express it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clantune_scale.core.schedule import ClanSchedule

_NUM_COMPARED = 1000
_NEAR = 1.05


def to_csv(schedule: ClanSchedule) -> str:
    """A row for each stretch of equal values: its steps, each gene, the learning rates' factor at both ends, undone."""
    names = [gene["name"] for gene in schedule.genes]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["start_step", "end_step", *names, "lr_factor_start", "lr_factor_end", "undone"])
    for segment in schedule.segments:
        values = [segment.values[name] for name in names]
        factors = [factor * schedule.rate_factor for factor in segment.lr_factor]
        writer.writerow([segment.start_step, segment.end_step, *values, *factors, segment.undone])
    return out.getvalue().rstrip("\n")


@dataclass(frozen=True)
class Fragment:
    """The part of a schedule that DeepSpeed's config can hold.

    Attributes:
        config: to be merged into a DeepSpeed config; empty if DeepSpeed can express nothing of the schedule.
        lost: what ``config`` leaves out, a sentence each.
        worst_rate_ratio: the largest ratio of the larger to the smaller of its learning rate and the schedule's, from
            the third step on, while the schedule's is above a hundredth of its peak; None if it has no rate.
    """

    config: dict[str, Any]
    lost: tuple[str, ...]
    worst_rate_ratio: float | None = None


def to_deepspeed(schedule: ClanSchedule, *, base_lr: float | None) -> Fragment:
    """The nearest ``WarmupDecayLR`` or ``WarmupLR``: a straight line up to the rate at which the decay starts.

    Args:
        schedule: the one to approximate.
        base_lr: the rate that a relative gene multiplies; None if it is not known or not constant.
    """
    lost = _lost_genes(schedule)
    gene = next((g for g in schedule.described_genes if g.target == "lr" and g.groups is None), None)
    if gene is None:
        return Fragment({}, (*lost, "the schedule has no learning rate for all groups"))
    if gene.relative and base_lr is None:
        return Fragment(
            {},
            (*lost, "the run had a schedule of its own beside the gene: keep it, with ClanScheduleLR(own=...)"),
        )
    base = (base_lr if gene.relative and base_lr is not None else 1.0) * schedule.rate_factor
    rates = [base * schedule.value_at(gene.name, s) * schedule.lr_factor_at(s) for s in range(schedule.num_steps)]
    decay_start = schedule.decay_start_step
    candidates = _candidates(rates, schedule.num_steps if decay_start is None else decay_start)
    ratios = [_worst_ratio(rates, [deepspeed_rate(one, step) for step in range(len(rates))]) for one in candidates]
    ratio, params = min(zip(ratios, candidates, strict=True), key=lambda pair: pair[0])
    if ratio > _NEAR:
        lost = (*lost, f"the steps of the learning rate: the straight lines are off by a factor of up to {ratio:.2f}")
    kind = "WarmupDecayLR" if "total_num_steps" in params else "WarmupLR"
    return Fragment({"scheduler": {"type": kind, "params": params}}, lost, ratio)


def _candidates(rates: Sequence[float], decay_start: int) -> list[dict[str, Any]]:
    """The few settings that can be near: up from zero or from the first rate, until the decay or at once.

    ``WarmupDecayLR`` decays to the rate from which it warms up, so a decay to zero needs a warm-up from zero.
    """
    decays = decay_start < len(rates)
    top = rates[min(decay_start, len(rates) - 1)]
    candidates = []
    for low in (0.0, rates[0]):
        for warm in (2, max(decay_start if decays else _last_move(rates), 2)):
            params = {"warmup_min_lr": low, "warmup_max_lr": top, "warmup_num_steps": warm, "warmup_type": "linear"}
            candidates.append(params | ({"total_num_steps": len(rates)} if decays else {}))
    return candidates


def deepspeed_rate(params: dict[str, Any], step: int) -> float:
    """The rate of DeepSpeed 0.19's ``WarmupLR`` or ``WarmupDecayLR`` in the step after ``step`` completed ones."""
    # The scheduler's first step() is called after the first update, so it is one step behind.
    behind = max(step - 1, 0)
    low, high, warm = params["warmup_min_lr"], params["warmup_max_lr"], params["warmup_num_steps"]
    share = 1.0
    if behind < warm:
        share = behind / warm
    elif "total_num_steps" in params:
        total = params["total_num_steps"]
        share = max(0.0, (total - behind) / max(1.0, total - warm))
    return low + (high - low) * share


def _lost_genes(schedule: ClanSchedule) -> tuple[str, ...]:
    names = [g.name for g in schedule.described_genes if g.target != "lr" or g.groups is not None]
    return (f"{', '.join(names)}: DeepSpeed has no scheduler that sets them",) if names else ()


def _last_move(rates: Sequence[float]) -> int:
    """The last step whose rate differs from that of the step before."""
    return next((step for step in range(len(rates) - 1, 0, -1) if rates[step] != rates[step - 1]), 0)


def _worst_ratio(wanted: Sequence[float], said: Sequence[float]) -> float:
    floor = max(wanted) / 100
    stride = max(len(wanted) // _NUM_COMPARED, 1)
    # In its first two steps each of DeepSpeed's warm-ups has its lowest rate.
    pairs = [(a, max(b, floor)) for a, b in zip(wanted[3::stride], said[3::stride], strict=True) if a > floor]
    return max((max(a / b, b / a) for a, b in pairs), default=1.0)
