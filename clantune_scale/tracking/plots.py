"""A picture of a run: fitness, learning rate and genes of every member over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clantune_scale.core.extras import require
from clantune_scale.errors import ClanError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Event = dict[str, Any]

# Okabe and Ito's palette: people with any common colour blindness tell these apart. After the last one the line style
# changes.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
_STYLES = ("-", "--", ":", "-.")


def plot_genes(events: Sequence[Event], path: Path) -> Path:
    """Draws fitness, the learning rate and each gene in a panel, shades competitive phases, and writes a PNG.

    Args:
        events: as :func:`read_events` gives them, with at least one ``round_end``.
        path: where the picture goes.

    Raises:
        ClanError: if no round was finished, or matplotlib is not installed.
    """
    require("matplotlib", needed_by="the picture of the genes")
    # The object interface with a canvas of its own does not touch the user's pyplot state and backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rounds = [event for event in events if event["kind"] == "round_end"]
    if not rounds:
        raise ClanError(f"no round is finished, so there is nothing to draw into {path}. Let the run finish one.")
    genes = next(event["genes"] for event in events if event["kind"] == "run_start")
    figure = Figure(figsize=(9, 2.2 * (2 + len(genes)) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 + len(genes), 1, sharex=True)
    members = _members(rounds)
    _draw_ends(panels[0], rounds, {m: [_of(event["members"], m, "loss") for event in rounds] for m in members})
    panels[0].set_ylabel("validation loss")
    _draw_ends(panels[1], rounds, {m: [_of(event["learning_rates"], m) for event in rounds] for m in members})
    panels[1].set(ylabel="learning rate", yscale="log")
    for axes, gene in zip(panels[2:], genes, strict=True):
        _draw_gene(axes, rounds, gene)
    for axes in panels:
        _shade_competition(axes, rounds)
        axes.grid(alpha=0.3)
    panels[0].legend(loc="upper right", ncols=4, fontsize="small")
    panels[-1].set_xlabel("optimizer steps")
    figure.savefig(path, dpi=120)
    return path


def _draw_ends(axes: Axes, rounds: Sequence[Event], values: dict[int, list[float]]) -> None:
    """Draws what was measured at each round's end, a line for each member."""
    steps = [event["step"] for event in rounds]
    for member, ends in values.items():
        axes.plot(steps, ends, marker=".", label=f"member {member}", **_look(member))


def _members(rounds: Sequence[Event]) -> range:
    """All members that there ever were: a resumed run may have another number of them."""
    return range(max(len(event["members"]) for event in rounds))


def _of(table: Sequence[Any], member: int, *keys: str) -> float:
    """A member's value; nan in a round in which the member was not there."""
    if member >= len(table):
        return math.nan
    value = table[member]
    for key in keys:
        value = value[key]
    return value


def _draw_gene(axes: Axes, rounds: Sequence[Event], gene: dict[str, Any]) -> None:
    name = gene["name"]
    for member in _members(rounds):
        values = [_of(event["members"], member, "genome", "values", name) for event in rounds]
        axes.plot(*_held(rounds, values), **_look(member))
    consensus = [event["consensus"].get(name) for event in rounds]
    if all(value is not None for value in consensus):
        axes.plot(*_held(rounds, consensus), color="black", linewidth=1, label="clan's value")
        axes.legend(fontsize="small")
    if gene["scale"] == "log":
        axes.set_yscale("log")
    axes.set_ylabel(f"{name} (factor)" if gene["relative"] else name)


def _held(rounds: Sequence[Event], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Points of a line for values that each hold for a whole round."""
    steps = [step for event in rounds for step in (event["start_step"], event["step"])]
    return steps, [value for value in values for _ in range(2)]


def _shade_competition(axes: Axes, rounds: Sequence[Event]) -> None:
    for event in rounds:
        start = event["start_step"]
        for phase in event["phases"]:
            end = start + phase["num_steps"]
            if phase["kind"] == "competitive":
                axes.axvspan(start, end, color="0.5", alpha=0.2, linewidth=0)
            start = end


def _look(member: int) -> dict[str, Any]:
    style = _STYLES[member // len(_COLORS) % len(_STYLES)]
    return {"color": _COLORS[member % len(_COLORS)], "linestyle": style, "linewidth": 1.4}
