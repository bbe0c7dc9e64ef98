"""Drawings: each gene's values and step sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clantune_scale.core.genome import Gene
from clantune_scale.tracking.report import canvas, thin
from clantune_scale.tracking.report.canvas import Drawing
from clantune_scale.tracking.report.series import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def trajectory(run: Run, gene: Gene, *, number: int) -> Drawing:
    """One gene of all members over the steps, with the clan's value and the bounds.

    Args:
        run: the run.
        gene: which.
        number: its place among the genes, for the file's name (a gene's own name may be no file name).
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        with canvas.panel(axes, run, f"{gene.name} (factor)" if gene.relative else gene.name):
            canvas.members(axes, run, run.values[gene.name], holds=True)
            x, y = thin.thin_line(*canvas.held(run, run.consensus[gene.name]))
            axes.plot(x, y, color="black", linewidth=2.2, label="the clan's value", zorder=3)
            scale(axes, gene)
            _bounds(axes, gene)
        canvas.legend(figure, axes)

    low, high = gene.bounds
    kind = "in effect only in competitive phases" if gene.kind == "specialized" else "in effect throughout"
    relative = "multiplies your own schedule; " if gene.relative else ""
    caption = (
        f"{relative}{kind}. Bounds: {low:g} to {high:g} (dash-dotted red: a bound in view)." + canvas.shading_note(run)
    )
    title = f"Gene {gene.name}"
    notes = canvas.thinning_notes(run)
    return Drawing(f"gene-{number}", title, caption[0].upper() + caption[1:], draw, rows=1.2, notes=notes)


def step_sizes(run: Run) -> Drawing:
    """The step size of every gene: the median over members, and the range from lowest to highest."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        with canvas.panel(axes, run, "step size (scale units)"):
            for index, gene in enumerate(run.genes):
                spread = thin.quantiles(run.step_sizes[gene.name])
                style = canvas.look(index, marked=False)
                x, middle = canvas.held(run, spread["median"])
                axes.plot(*thin.thin_line(x, middle), label=canvas.plain(gene.name), **style)
                low, high = (canvas.held(run, spread[end])[1] for end in ("lowest", "highest"))
                axes.fill_between(*thin.thin_band(x, low, high), color=style["color"], alpha=0.15, linewidth=0)
            axes.set_yscale("log")
            canvas.plain_ticks(axes)
        canvas.legend(figure, axes)

    caption = (
        "Standard deviation of a change, by gene: the median over members, shaded from lowest to highest. In "
        "scale units: 0.1 is about 10 % of a gene on a logarithmic scale."
    )
    notes = canvas.thinning_notes(run)[1:] if run.num_members > thin.MAX_LINES else canvas.thinning_notes(run)
    return Drawing("step_sizes", "Step sizes", caption, draw, rows=1.0, notes=notes)


def scale(axes: Axes, gene: Gene) -> None:
    """The axis in the gene's own scale, as far as one can read it."""
    low, high = axes.get_ylim()
    if gene.scale == "log":
        axes.set_yscale("log")
        # A gene that hardly moved would get an axis of a millionth of a decade, and labels to match.
        middle = float(np.sqrt(max(low, 1e-300) * max(high, 1e-300)))
        if max(low, 1e-300) * 1.3 > high:
            axes.set_ylim(middle / 1.2, middle * 1.2)
        canvas.plain_ticks(axes)


def _bounds(axes: Axes, gene: Gene) -> None:
    """Lines at the bounds that are near enough to be in view without flattening everything else."""
    low, high = axes.get_ylim()
    logarithmic = axes.get_yscale() == "log"
    reach = (high / low) ** 0.5 if logarithmic else (high - low) * 0.5
    first, last = (low / reach, high * reach) if logarithmic else (low - reach, high + reach)
    drawn = [bound for bound in gene.bounds if first <= bound <= last]
    for index, bound in enumerate(drawn):
        axes.axhline(bound, color=canvas.RED, linestyle="-.", linewidth=1.2, label="bound" if index == 0 else None)
