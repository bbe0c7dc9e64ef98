"""Drawing: the lineage of the members."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from clantune_scale.tracking.report import canvas, thin
from clantune_scale.tracking.report.canvas import Drawing
from clantune_scale.tracking.report.series import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_ROUNDS = 80
_MAX_CELLS = 1_200


def survivors(run: Run) -> np.ndarray:
    """[R, M] bool: whether what the member trained in that round has descendants among the current members."""
    alive = np.zeros(run.donors.shape, dtype=bool)
    ancestors = np.arange(run.num_members)
    for index in range(run.num_rounds - 1, -1, -1):
        ancestors = run.donors[index, ancestors]
        alive[index, ancestors] = True
    return alive


def family(run: Run) -> Drawing:
    """The tree with every clone and death; for a large run, counts of deaths and of surviving lines."""
    if run.num_rounds <= _MAX_ROUNDS and run.donors.size <= _MAX_CELLS:
        caption = (
            "A lane for each member. Blue: states with living descendants. Dotted grey: replaced states; a cross "
            "marks their end, an arrow comes from the donor. Black: the ancestry of member "
            f"{run.best}."
        )
        rows = min(0.5 + 0.25 * run.num_members, 4.0)
        return Drawing("family", "Family tree", caption, lambda figure: _tree(figure, run), rows=max(rows, 1.2))
    caption = (
        "Above: number of replaced states, by member and stretch of the run; dots mark the ancestors of member "
        f"{run.best}. Below: number of states of that time with living descendants."
    )
    deaths = int((run.donors != np.arange(run.num_members)).sum())
    note = f"{deaths:,} clones are counted in {len(_stretches(run)):,} stretches and not drawn one by one"
    return Drawing("family", "Family tree", caption, lambda figure: _map(figure, run), rows=2.4, notes=(note,))


def _tree(figure: Figure, run: Run) -> None:
    axes = figure.subplots()
    alive = survivors(run)
    own = np.arange(run.num_members)
    for index in range(run.num_rounds):
        for member in own:
            style: dict[str, Any] = {"color": canvas.BLUE, "linewidth": 2.2} if alive[index, member] else _GIVEN_UP
            axes.plot([index, index + 1], [member, member], **style)
        for member in np.flatnonzero(run.donors[index] != own):
            _clone(axes, index + 1, int(run.donors[index, member]), int(member))
        if run.restored[index]:
            axes.axvline(index + 1, color=canvas.RED, linestyle="--", linewidth=1.2)
    rounds = np.arange(run.num_rounds)
    lane = np.repeat(run.ancestry(run.best), 2)
    axes.plot(np.stack([rounds, rounds + 1], axis=1).ravel(), lane, color="black", linewidth=1.4, zorder=4)
    _lanes(axes, run)
    # Equally wide rounds: by steps, the short ones at the start would lie on top of each other.
    shown = np.unique(np.linspace(0, run.num_rounds - 1, min(run.num_rounds, 7)).astype(int))
    axes.set_xticks(shown + 1, [f"{step:,}" for step in run.end_steps[shown]])
    axes.set_xlabel("rounds, by the optimizer step of their end")


_GIVEN_UP: dict[str, Any] = {"color": "0.55", "linewidth": 1.2, "linestyle": ":"}


def _clone(axes: Axes, step: float, donor: int, recipient: int) -> None:
    axes.plot(step, recipient, marker="X", color=canvas.RED, markersize=5, linestyle="", zorder=3)
    arrow = {"arrowstyle": "-|>", "color": "0.4", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
    axes.annotate("", xy=(step, recipient), xytext=(step, donor), arrowprops=arrow)


def _map(figure: Figure, run: Run) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
    first = _stretches(run)
    deaths = np.add.reduceat((run.donors != np.arange(run.num_members)).astype(int), first, axis=0)
    edges = np.append(run.start_steps[first], run.num_steps)
    lanes = np.arange(run.num_members + 1) - 0.5
    # As an image inside the drawing: a cell each would be megabytes of paths.
    image = above.pcolormesh(edges, lanes, deaths.T, cmap="Blues", vmin=0, rasterized=True)
    figure.colorbar(image, ax=above, label="states replaced", fraction=0.05)
    above.plot(run.start_steps[first], run.ancestry(run.best)[first], ".", color=canvas.ORANGE, markersize=4)
    _lanes(above, run)
    x, y = thin.thin_line(run.end_steps, survivors(run).sum(axis=1).astype(float))
    below.plot(x, y, color=canvas.BLUE)
    below.set(ylabel="surviving\nstates", yscale="log")
    canvas.step_axis(below, run)
    below.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _stretches(run: Run) -> np.ndarray:
    return thin.bins(run.num_rounds) if thin.is_long(run.num_rounds) else np.arange(run.num_rounds)


def _lanes(axes: Axes, run: Run) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(run.num_members, 9)))
    axes.set_ylabel("member")
    axes.set_ylim(run.num_members - 0.5, -0.5)
    axes.grid(visible=False)
