"""A picture of several runs: the best member's validation loss and its learning rate over the steps.

    python -m clantune_scale.bench.picture --to quickstart.png \\
        "as configured=bench_runs/control-0/control" "the clan=bench_runs/clan-0/clan"

Each run is a folder with ``events.jsonl``. A run of the strategy ``control``, in which a clan changes nothing, shows
what a schedule does without a clan: plain data parallelism writes no events.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clantune_scale.errors import ClanError
from clantune_scale.tracking.events import read_events

# Okabe and Ito's palette, without its yellow.
_COLORS = ("#555555", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#E69F00")


@dataclass(frozen=True)
class Curve:
    """What one run's rounds ended with.

    Attributes:
        steps: [rounds] optimizer steps done at each round's end, ascending.
        losses: [rounds] the lowest finite loss of any member on the validation window.
        learning_rates: [rounds] that member's learning rate in the round's last step.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]


def curve_of(events: Sequence[Mapping[str, Any]]) -> Curve:
    """The curve of a run, from its events; rounds in which no member's loss was finite are left out.

    Raises:
        ClanError: if no round has a finite loss.
    """
    points = []
    for event in events:
        if event["kind"] != "round_end":
            continue
        losses = [_number(member["loss"]) for member in event["members"]]
        best = min(range(len(losses)), key=losses.__getitem__)
        if math.isfinite(losses[best]):
            points.append((event["step"], losses[best], _number(event["learning_rates"][best])))
    if not points:
        raise ClanError("no round of the run has a finite validation loss to draw. Let the run finish a round.")
    return Curve(*zip(*points, strict=True))


def draw(curves: Mapping[str, Curve], path: Path) -> Path:
    """Writes a PNG with a panel of losses and one of learning rates, a line per run.

    Args:
        curves: by label, in the order of the legend.
        path: where the picture goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(1, 2, sharex=True)
    for number, (label, curve) in enumerate(curves.items()):
        look = {"color": _COLORS[number % len(_COLORS)], "linewidth": 1.8}
        loss.plot(curve.steps, curve.losses, label=label, **look)
        # A logarithmic axis has no zero, and a decay may end there.
        rates = [value if value > 0 else math.nan for value in curve.learning_rates]
        rate.plot(curve.steps, rates, label=label, **look)
    loss.set(ylabel="validation loss (nats per byte)", yscale="log")
    rate.set(ylabel="learning rate", yscale="log")
    for axes in (loss, rate):
        axes.set_xlabel("optimizer steps")
        axes.grid(alpha=0.3, which="both")
    loss.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the runs that are named and writes the picture."""
    parser = argparse.ArgumentParser(prog="clantune_scale.bench.picture", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN_DIR", help="runs in the order of the legend")
    parser.add_argument("--to", type=Path, default=Path("runs.png"), help="the picture")
    options = parser.parse_args(argv)
    curves = {}
    for entry in options.runs:
        label, found, folder = entry.partition("=")
        if not found or not label:
            parser.error(f"{entry!r} is no LABEL=RUN_DIR, as in 'the clan=clan_runs/quickstart'")
        events = Path(folder) / "events.jsonl"
        if not events.exists():
            parser.error(f"{folder} has no events.jsonl. Name the folder of one run")
        curves[label] = curve_of(read_events(events))
    print(f"picture of {len(curves)} runs: {draw(curves, options.to)}")


def _number(value: float | None) -> float:
    """The value; inf for what is missing or not finite."""
    return value if value is not None and math.isfinite(value) else math.inf


if __name__ == "__main__":
    main()
