"""Drawing: the schedule found by the run, beside the user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clantune_scale.core.genome import Gene
from clantune_scale.tracking.report import canvas, thin
from clantune_scale.tracking.report.canvas import Drawing
from clantune_scale.tracking.report.genes import scale
from clantune_scale.tracking.report.series import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def along(run: Run, values: np.ndarray) -> np.ndarray:
    """[R] of values [R, M], each round's from the member that trained in it what the champion carries."""
    return values[np.arange(run.num_rounds), run.ancestry(run.best)]


def rates(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """Learning rates at each round's end, [R] each: along the champion's ancestry, and that of the
    user's own schedule. None if the events do not have them.
    """
    gene = next((gene for gene in run.genes if gene.target == "lr"), None)
    found = along(run, run.rates)
    if not np.isfinite(found).any():
        return None
    return found, np.where(np.isfinite(run.scheduled_rate), run.scheduled_rate, _undone(run, gene, found))


def _undone(run: Run, gene: Gene | None, found: np.ndarray) -> np.ndarray:
    """[R] the learning rates without the gene and the decay, for events without the user's schedule."""
    if gene is None:
        return found / _positive(run.lr_factor)
    if not gene.relative:
        return np.full(run.num_rounds, gene.initial)
    return found / _positive(run.lr_factor * along(run, run.values[gene.name]))


def found(run: Run) -> Drawing:
    """A panel for the learning rate, and one for each other gene."""
    others = [gene for gene in run.genes if gene.target != "lr"]
    pair = rates(run)
    has_specialized = any(gene.kind == "specialized" for gene in others)
    count = len(others) + (pair is not None)

    def draw(figure: Figure) -> None:
        panels = list(figure.subplots(max(count, 1), 1, sharex=True, squeeze=False)[:, 0])
        first = panels[0]
        if pair is not None:
            _panel(panels.pop(0), run, "learning rate", run.end_steps, pair)
            if (pair[0] > 0).all() and (pair[1] > 0).all():
                first.set_yscale("log")
        for axes, gene in zip(panels, others, strict=False):
            x, values = canvas.held(run, along(run, run.values[gene.name]))
            _panel(axes, run, _label(gene), x, (values, np.full(len(x), gene.initial)))
            if gene.kind == "specialized":
                shared = canvas.held(run, run.consensus[gene.name])[1]
                axes.plot(*thin.thin_line(x, shared), color=canvas.GREEN, linestyle=":", label="while cooperating")
            scale(axes, gene)
        for axes in figure.axes[:-1]:
            axes.set_xlabel("")
        # Only a specialized gene has a third line.
        canvas.legend(figure, max(figure.axes, key=lambda axes: len(axes.lines)))

    caption = (
        f"The values in effect along the ancestry of member {run.best}, {_carrier(run)}, beside your own schedule and "
        "initial values. The strategy's final decay is part of the schedule found."
        + (" Dotted: the clan's value, in effect in cooperative phases." if has_specialized else "")
    )
    notes = canvas.thinning_notes(run)[-1:] if thin.is_long(run.num_rounds) else ()
    return Drawing("schedule", "Schedule found", caption, draw, rows=0.9 * max(count, 1), notes=notes)


def _panel(axes: Axes, run: Run, label: str, x: np.ndarray, lines: tuple[np.ndarray, np.ndarray]) -> None:
    with canvas.panel(axes, run, label):
        axes.plot(*thin.thin_line(x, lines[1]), color=canvas.ORANGE, linestyle="--", label="your own")
        axes.plot(*thin.thin_line(x, lines[0]), color=canvas.BLUE, linewidth=2, label="found")


def _label(gene: Gene) -> str:
    return f"{gene.name} (factor)" if gene.relative else gene.name


def _carrier(run: Run) -> str:
    return "the champion" if run.end is not None and run.end.get("champion") is not None else "the fittest so far"


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)
