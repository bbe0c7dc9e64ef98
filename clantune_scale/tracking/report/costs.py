"""Drawing: the run's time by part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clantune_scale.tracking.report import canvas, thin
from clantune_scale.tracking.report.canvas import Drawing
from clantune_scale.tracking.report.series import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOOKS = {
    "cooperative": (canvas.BLUE, ""),
    "competitive": (canvas.ORANGE, "//"),
    "evaluation": (canvas.GREEN, ".."),
    "transfer": (canvas.RED, "xx"),
}


def costs(run: Run) -> Drawing:
    """Seconds by part: the whole run's, and every round's per optimizer step."""
    totals = {part: float(np.nansum(seconds)) for part, seconds in run.seconds.items()}

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, height_ratios=(0.5 + 0.3 * len(totals), 2))
        above.barh(range(len(totals)), totals.values(), color=[_look(part)[0] for part in totals])
        for bar, part in zip(above.patches, totals, strict=True):
            bar.set_hatch(_look(part)[1])
            bar.set_edgecolor("white")
        above.set_yticks(range(len(totals)), [canvas.plain(part) for part in totals])
        above.invert_yaxis()
        above.set_xlabel("total seconds")
        first = thin.bins(run.num_rounds) if thin.is_long(run.num_rounds) else np.arange(run.num_rounds)
        steps = np.add.reduceat(run.end_steps - run.start_steps, first)
        edges = np.append(run.start_steps[first], run.num_steps)
        below.stackplot(
            np.repeat(edges, 2)[1:-1],
            *(np.repeat(np.add.reduceat(seconds, first) / steps, 2) for seconds in run.seconds.values()),
            colors=[_look(part)[0] for part in totals],
            hatch=[_look(part)[1] for part in totals],
            labels=[canvas.plain(part) for part in totals],
            edgecolor="white",
            linewidth=0,
        )
        below.set_ylabel("seconds per step")
        canvas.step_axis(below, run)
        canvas.legend(figure, below)

    whole = sum(totals.values())
    shares = ", ".join(f"{part} {seconds / max(whole, 1e-9):.1%}" for part, seconds in totals.items())
    notes = ("seconds per step are means over stretches of rounds",) if thin.is_long(run.num_rounds) else ()
    caption = (
        f"Rank 0's clock: {shares}. Below: seconds per step, with evaluation and transfer divided among the steps."
    )
    return Drawing("costs", "Time", caption, draw, rows=1.7, notes=notes)


def _look(part: str) -> tuple[str, str]:
    return _LOOKS.get(part, (canvas.PINK, "--"))
