"""Events as numbers with names: what is charted of a run, whoever draws the charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clantune_scale.tracking.background import Event

Metrics = dict[str, float]

_OF_A_MEMBER = ("gradient_norm", "drift", "alignment", "strikes", "training_loss")


def of_step(event: Event) -> Metrics:
    """Of the clan, at a ``step`` event; without a loss if the run sees none."""
    return {f"train/{key}": event[key] for key in ("loss", "step_s", "samples") if event[key] is not None}


def of_phase(event: Event) -> Metrics:
    """The clan's, when a phase begins: a square wave over the steps."""
    return {"phase/competitive": float(event["phase"] == "competitive")}


def of_round(event: Event) -> Metrics:
    """Of the clan, at a ``round_end`` event; what the event does not have is left out."""
    metrics = {f"seconds/{part}": seconds for part, seconds in event["seconds"].items()}
    metrics |= {f"consensus/{gene}": value for gene, value in event["consensus"].items()}
    metrics |= {"round": event["round"], "lr_factor": event["lr_factor"], "restored": float(event["restored"])}
    metrics["lineage/clones"] = sum(member["donor"] != member["member"] for member in event["members"])
    metrics |= _over_members(event, "loss", "fitness", {"best": min, "mean": _mean, "worst": max})
    metrics |= _over_members(event, "drift", "drift", {"mean": _mean, "largest": max})
    metrics |= _over_members(event, "alignment", "alignment", {"mean": _mean, "least": min})
    metrics |= _over_members(event, "gradient_norm", "gradient_norm", {"mean": _mean})
    metrics |= _over_members(event, "strikes", "strikes", {"sum": sum})
    metrics |= {unit: event[unit] for unit in ("samples", "tokens") if event.get(unit) is not None}
    for kind, measured in (event.get("throughput") or {}).items():
        rates = {unit: measured.get(unit) for unit in ("samples_per_s", "tokens_per_s")}
        metrics |= {f"throughput/{kind}_{unit}": rate for unit, rate in rates.items() if rate is not None}
    if "straggler" in event:
        metrics["straggler/seconds"] = event["straggler"]["seconds"] if event["straggler"] else 0.0
    return metrics


def of_member(event: Event, member: Mapping[str, Any], learning_rate: float) -> Metrics:
    """Of one member, at a ``round_end`` event."""
    genome = member["genome"]
    metrics = {"fitness/loss": member["loss"], "fitness/standard_error": member["standard_error"]}
    metrics |= {f"gene/{name}": value for name, value in genome["values"].items()}
    metrics |= {f"step_size/{name}": value for name, value in genome["step_sizes"].items()}
    metrics |= {"lineage/donor": member["donor"], "learning_rate": learning_rate}
    return metrics | {name: member[name] for name in _OF_A_MEMBER if member.get(name) is not None}


def chartable(value: float | None) -> float:
    """A number that a chart survives: MLflow stores an infinity as 1.8e308, which flattens everything beside it."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _over_members(
    event: Event, name: str, group: str, summaries: Mapping[str, Callable[[Sequence[float]], float]]
) -> Metrics:
    values = [member.get(name) for member in event["members"]]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return {f"{group}/{summary}": of(finite) for summary, of in summaries.items()} if finite else {}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
