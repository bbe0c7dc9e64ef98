"""Seconds that were measured in a run, in place of a hardware preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clantune_scale.errors import ClanError
from clantune_scale.tracking.history import rounds_of, start_of


@dataclass(frozen=True)
class Measured:
    """Seconds of a run's parts.

    Attributes:
        step_s: an optimizer step of a cooperative phase.
        competitive_step_s: a step of a competitive phase, divided by how many times its usual share of the batch a
            member trained on; equal to ``step_s`` if the run had no competitive phase, or its members on the line.
        evaluation_s: one evaluation of the validation window.
        transfer_s: a round's clones and copies.
        samples_per_rank: of the run's validation window; evaluation is scaled by it.
        num_rounds: rounds that were measured.
    """

    step_s: float
    competitive_step_s: float
    evaluation_s: float
    transfer_s: float
    samples_per_rank: float
    num_rounds: int


def measure(events: Sequence[Mapping[str, Any]]) -> Measured:
    """Means over a run's rounds. If there are several, the first is left out, because it includes the start-up.

    Raises:
        ClanError: if there is no finished round.
    """
    rounds = rounds_of(events)
    if not rounds:
        raise ClanError("the run to measure has no finished round. Give a run that has one.")
    rounds = rounds[1:] or rounds
    start = start_of(events)
    step_s = _per_step(rounds, "cooperative")
    evaluation_s, competitive_s = _mean(rounds, "evaluation"), None
    if start.get("members") == "line":
        evaluation_s = _per_point(rounds)
    else:
        competitive_s = _per_step(rounds, "competitive")
    return Measured(
        step_s=step_s if step_s is not None else competitive_s or 0.0,
        competitive_step_s=competitive_s if competitive_s is not None else step_s or 0.0,
        evaluation_s=evaluation_s,
        transfer_s=_mean(rounds, "transfer"),
        samples_per_rank=start["config"]["fitness"]["num_samples"] / start["batch"]["dp_size"],
        num_rounds=len(rounds),
    )


def _per_step(rounds: Sequence[Mapping[str, Any]], kind: str) -> float | None:
    phases = [phase for event in rounds for phase in event["phases"] if phase["kind"] == kind]
    shares = sum(phase["num_steps"] * phase.get("batch_factor", 1) for phase in phases)
    return sum(event["seconds"].get(kind, 0.0) for event in rounds) / shares if shares else None


def _per_point(rounds: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of one evaluation on the line, at whose rounds' ends each different genome is measured.

    Rounds with turns are left out: their evaluations are in the competitive seconds.
    """
    cooperative = [event for event in rounds if all(phase["kind"] == "cooperative" for phase in event["phases"])]
    points = sum(
        len({tuple(sorted(member["genome"]["values"].items())) for member in event["members"]}) for event in cooperative
    )
    return sum(event["seconds"].get("evaluation", 0.0) for event in cooperative) / points if points else 0.0


def _mean(rounds: Sequence[Mapping[str, Any]], part: str) -> float:
    return sum(event["seconds"].get(part, 0.0) for event in rounds) / len(rounds)
