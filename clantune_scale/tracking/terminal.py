"""The terminal output of a run: a line every few steps, a table per round, and the paths of all results."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from clantune_scale.config.batch import BatchPlan
from clantune_scale.tracking.background import Event
from clantune_scale.tracking.live import Progress, Screen, screen, training_loss

logger = logging.getLogger(__name__)


class Terminal:
    """Prints events, one rank's.

    Args:
        events_path: the events file, named at the end.
        mlflow_hint: how to look at the run in MLflow; None if MLflow is not used.
        on: where it is printed; standard output if None, live if that is a terminal.
    """

    def __init__(self, *, events_path: Path, mlflow_hint: str | None, on: Screen | None = None) -> None:
        self._events_path = events_path
        self._mlflow_hint = mlflow_hint
        self._screen = on or screen()
        self._progress = Progress()
        self._formats = {
            "run_start": self._start,
            "resume": self._resume,
            "step": self._step,
            "round_end": self._round,
            "member_lost": self._lost,
            "run_end": self._end,
        }

    def show(self, event: Event) -> None:
        """Prints one event. Some kinds need no line, and a step needs none if a live line shows it."""
        status = self._progress.take(event)
        is_told = status is not None and self._screen.status(status)
        if event["kind"] == "run_end":
            self._screen.status("")
        if event["kind"] == "warning":
            # To logging, so that users can route and silence it; the line that is written over makes way.
            self._screen.status("")
            logger.warning("clan warning: %s", event["message"])
            return
        format_event = self._formats.get(event["kind"])
        for line in format_event(event) if format_event and not is_told else ():
            self._screen.line(line)

    def _start(self, event: Event) -> Sequence[str]:
        ranks = len(event["member_ranks"][0])
        genes = ", ".join(gene["name"] for gene in event["genes"]) or "none"
        # Members on the line have no ranks of their own.
        on = "on the line of one model on" if event.get("members") == "line" else "x"
        return (
            f"clan {event['name']}: {event['population_size']} members {on} {ranks} rank{'s' * (ranks > 1)}, "
            f"strategy {event['strategy']}, genes {genes}{_rounding(event.get('rounded_to'))}",
            f"clan {event['name']}: {BatchPlan(**event['batch']).describe()}",
            f"clan {event['name']}: events in {self._events_path}",
        )

    def _resume(self, event: Event) -> Sequence[str]:
        lost = f"; later events are in {event['lost_events']}" if event["lost_events"] else ""
        return (
            f"clan {event['name']}: resumes after {event['step']} steps from {event['resumed_from']}",
            f"clan {event['name']}: events in {self._events_path}{lost}",
        )

    def _step(self, event: Event) -> Sequence[str]:
        return (
            f"step {event['step']:>6}  round {event['round']:>3} {event['phase']:<11}  "
            f"{training_loss(event)}{event['step_s']:.3f} s/step",
        )

    def _round(self, event: Event) -> Sequence[str]:
        seconds = ", ".join(f"{part} {value:.1f}" for part, value in event["seconds"].items())
        title = f"round {event['round']}: steps {event['start_step']} to {event['step']}, seconds: {seconds}"
        if event["restored"]:
            title += ", rolled back"
        return (title, *("  " + line for line in _aligned(_round_table(event))))

    def _lost(self, event: Event) -> Sequence[str]:
        lost = "; ".join(f"member {member}: {what}" for member, what in event["members"].items()) or "no member lost"
        left = ", ".join(map(str, event["left"]))
        return (
            f"clan generation {event['generation']}: {lost}; continues after {event['seconds']:.0f} s with members "
            f"{left} (reported by {event['reason']})",
        )

    def _end(self, event: Event) -> Sequence[str]:
        result = f"clan {event['status']} after {event['step']} steps"
        if event["champion"] is not None:
            result += f": the champion is member {event['champion']}, loss {event['champion_loss']:.4f}"
        places = {**event["artifacts"], "events": self._events_path}
        if self._mlflow_hint:
            places["mlflow"] = self._mlflow_hint
        width = max(map(len, places))
        return (result, *(f"  {name:<{width}}  {place}" for name, place in places.items()))


def _rounding(dtype: str | None) -> str:
    """What is rounded if the weights have no fp32 masters; an average and a line are kept in fp32."""
    share = {"bfloat16": "2^-8", "float16": "2^-11"}.get(dtype or "")
    return f"; a member's weights are rounded to {dtype} (by up to {share} of each) when written" if share else ""


def _round_table(event: Event) -> list[list[str]]:
    genes = list(event["members"][0]["genome"]["values"])
    header = ["member", "loss", "± se", *genes, "learning rate", "parent", "reason"]
    rows = []
    for member, rate in zip(event["members"], event["learning_rates"], strict=True):
        values = [f"{member['genome']['values'][gene]:.4g}" for gene in genes]
        parent = "-" if member["donor"] == member["member"] else str(member["donor"])
        measured = [f"{member['loss']:.4f}", f"{member['standard_error']:.4f}"]
        rows.append([str(member["member"]), *measured, *values, f"{rate:.3g}", parent, member["reason"]])
    # Members that do not differ (after the genes freeze, or without genes) need one row.
    if all(row[1:] == rows[0][1:] for row in rows):
        rows = [["all", *rows[0][1:]]]
    return [header, *rows]


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    # Numbers to the right; the last column is a phrase.
    return [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]).rstrip()
        for row in table
    ]
