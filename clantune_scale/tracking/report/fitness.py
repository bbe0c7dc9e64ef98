"""Drawings: the members' losses over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clantune_scale.tracking.report import canvas, thin
from clantune_scale.tracking.report.canvas import Drawing
from clantune_scale.tracking.report.series import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def fitness(run: Run) -> Drawing:
    """The members' validation loss at every round's end, the training loss, rollbacks and the freeze."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        with canvas.panel(axes, run, "loss"):
            canvas.members(axes, run, np.where(np.isfinite(run.loss), run.loss, np.nan))
            _training(axes, run)
            _events(axes, run)
        if _is_wide(run.loss):
            axes.set_yscale("log")
        canvas.legend(figure, axes)

    caption = (
        "Validation loss of every member at each round's end, on the same window for all. Lower is fitter."
        + (" Dotted grey: training loss of rank 0's member." if len(run.training) else "")
        + canvas.shading_note(run)
    )
    return Drawing("fitness", "Fitness", caption, draw, rows=1.5, notes=canvas.thinning_notes(run))


def gaps(run: Run) -> Drawing:
    """Each member's loss minus the round's lowest: the differences that selection uses."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        with canvas.panel(axes, run, "loss above the round's best"):
            finite = np.where(np.isfinite(run.loss), run.loss, np.nan)
            best = np.fmin.reduce(finite, axis=1)
            canvas.members(axes, run, finite - best[:, None], joined=False)
            error = np.nanmedian(run.measured["standard_error"], axis=1) if run.has("standard_error") else None
            if error is not None:
                x, y = thin.thin_line(run.end_steps, error)
                axes.plot(x, y, color="0.35", linestyle=":", label="one standard error")
            axes.set_yscale("symlog", linthresh=_smallest(finite - best[:, None]))
            axes.set_ylim(bottom=0)
        canvas.legend(figure, axes)

    caption = (
        "Each member's loss minus the lowest in its round: the differences that selection uses. Dotted: the standard "
        "error of one member's loss over the window. Differences between members have a smaller error, because all "
        "members are evaluated on the same examples." + canvas.shading_note(run)
    )
    return Drawing("gaps", "Differences between members", caption, draw, rows=1.1, notes=canvas.thinning_notes(run))


def _training(axes: Axes, run: Run) -> None:
    if len(run.training):
        x, y = thin.thin_line(run.training[:, 0], run.training[:, 1])
        axes.plot(x, y, color="0.5", linestyle=":", linewidth=1, zorder=1, label="training")


def _events(axes: Axes, run: Run) -> None:
    for index, step in enumerate(run.end_steps[run.restored][:100]):
        label = "rolled back" if index == 0 else None
        axes.axvline(step, color=canvas.RED, linestyle="--", linewidth=1.2, label=label)
    frozen = run.frozen_round
    if frozen is not None:
        axes.axvline(run.start_steps[frozen], color="black", linestyle="-.", linewidth=1.2, label="genes freeze")


def _is_wide(loss: np.ndarray) -> bool:
    finite = loss[np.isfinite(loss)]
    return bool(finite.size) and finite.min() > 0 and finite.max() > 20 * finite.min()


def _smallest(differences: np.ndarray) -> float:
    """Where the logarithmic part of the axis begins: below nine tenths of the differences."""
    positive = differences[np.isfinite(differences) & (differences > 0)]
    return float(np.quantile(positive, 0.1)) if positive.size else 1e-3
