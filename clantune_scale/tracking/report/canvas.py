"""What all drawings of the report share: size, colours, shading, and how they get onto the page.

The colours are Okabe and Ito's: people with any common colour blindness tell them apart. Line styles and markers
differ too, for a printer without colours.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clantune_scale.tracking.report import thin
from clantune_scale.tracking.report.series import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLORS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"

# Inches. At this width letters are still 10 CSS pixels high on a telephone of 360 pixels.
_WIDTH = 5.2
_MAX_SHADES = 120
_MAX_MARKS = 80
_UNJOINED = {"linestyle": ""}

#: ``Any``, because matplotlib's annotation lists every key as a Literal and a plain ``str`` does not pass.
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "legend.fontsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    # Letters stay text: a reader can search them and have them read aloud, and they have the page's font.
    "svg.fonttype": "none",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Drawing:
    """One picture of the report.

    Attributes:
        name: of the picture's file.
        title: above the picture.
        caption: below it; says in words what it shows.
        draw: draws it onto an empty figure.
        rows: height of the picture, in panels.
        notes: what was thinned.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Figure], None]
    rows: float = 1.0
    notes: tuple[str, ...] = ()


def render(drawing: Drawing, folder: Path) -> str:
    """Draws a picture, writes ``folder/NAME.png``, and returns the picture as an ``<svg>`` element."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Marks and clips have ids. The salt makes those of two pictures on one page different.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": drawing.name}):
        figure = Figure(figsize=(_WIDTH, 0.6 + 2.5 * drawing.rows), layout="constrained")
        FigureCanvasAgg(figure)
        drawing.draw(figure)
        figure.savefig(folder / f"{drawing.name}.png", dpi=150, metadata={"Software": None})
        text = io.StringIO()
        figure.savefig(text, format="svg", dpi=150, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _element(text.getvalue())


def _element(document: str) -> str:
    """The ``<svg>`` of a document. The page sets its size, and ids to which nothing refers are removed."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[a-zA-Z0-9]+_\d+">', "<g>", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", head)
    return f'{head} aria-hidden="true">{rest}'


def plain(text: str) -> str:
    """``text`` for a label. A user's dollar sign starts no formula, and a leading underscore hides no label."""
    escaped = text.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{escaped}" if escaped.startswith("_") else escaped


def look(index: int, *, marked: bool) -> dict[str, Any]:
    """How the line of member ``index`` looks; with marks if ``marked``."""
    style: dict[str, Any] = {
        "color": COLORS[index % len(COLORS)],
        "linestyle": STYLES[index // 2 % len(STYLES)],
    }
    return style | ({"marker": MARKERS[index % len(MARKERS)]} if marked else {})


def held(run: Run, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of a line for values [R] that each hold for a whole round."""
    return np.stack([run.start_steps, run.end_steps], axis=1).ravel(), np.repeat(values, 2)


def members(axes: Axes, run: Run, values: np.ndarray, *, holds: bool = False, joined: bool = True) -> None:
    """Draws each member's values as a line. If there are many members, draws their range and quantiles.

    Args:
        axes: to draw into.
        run: of the values.
        values: [R, M].
        holds: whether a value holds for its whole round (a gene), or was measured at its end (a loss).
        joined: whether lines join the marks, if there are marks.
    """
    points = (lambda column: held(run, column)) if holds else (lambda column: (run.end_steps, column))
    if run.num_members <= thin.MAX_LINES:
        for member in range(run.num_members):
            x, y = thin.thin_line(*points(values[:, member]))
            style = look(member, marked=not holds and len(x) <= _MAX_MARKS)
            axes.plot(x, y, label=f"member {member}", **style | ({} if joined or "marker" not in style else _UNJOINED))
        return
    spread = thin.quantiles(values)
    for low, high, shade, label in (
        ("lowest", "highest", 0.18, "all members"),
        ("tenth", "ninetieth", 0.35, "8 of 10 members"),
    ):
        x, bottom = points(spread[low])
        axes.fill_between(
            *thin.thin_band(x, bottom, points(spread[high])[1]), color=SKY, alpha=shade, lw=0, label=label
        )
    axes.plot(*thin.thin_line(*points(spread["median"])), color=BLUE, label="median")


def shade_phases(axes: Axes, run: Run) -> None:
    """Shades competitive phases in grey. If they are too many to tell apart, shades one lighter area."""
    spans = run.competitive
    if len(spans) <= _MAX_SHADES:
        for first, last in spans:
            axes.axvspan(first, last, color="0.45", alpha=0.22, linewidth=0)
    elif len(spans):
        axes.axvspan(spans[0, 0], spans[-1, 1], color="0.45", alpha=0.10, linewidth=0)


def shading_note(run: Run) -> str:
    """What the grey means, for a caption; empty if there is no grey."""
    spans = run.competitive
    if not len(spans):
        return ""
    if len(spans) <= _MAX_SHADES:
        return " Grey: competitive phases."
    share = (spans[:, 1] - spans[:, 0]).sum() / (spans[-1, 1] - spans[0, 0])
    return f" Grey: {len(spans):,} competitive phases, too many to draw apart. They are {share:.1%} of the steps there."


def thinning_notes(run: Run) -> tuple[str, ...]:
    """What a picture of this run leaves out."""
    notes = []
    if run.num_members > thin.MAX_LINES:
        notes.append(f"of {run.num_members} members the spread is drawn: all, the middle 80 %, the median")
    if thin.is_long(run.num_rounds):
        stretch = run.num_rounds / len(thin.bins(run.num_rounds))
        notes.append(f"every {stretch:.0f} rounds are drawn as one stretch, from its lowest to its highest value")
    return tuple(notes)


@contextmanager
def panel(axes: Axes, run: Run, ylabel: str) -> Iterator[None]:
    """Labels and shading around the drawing of a panel over steps."""
    shade_phases(axes, run)
    yield
    axes.set_ylabel(plain(ylabel))
    step_axis(axes, run)


def step_axis(axes: Axes, run: Run) -> None:
    """An axis over all optimizer steps, with few enough numbers that they do not touch."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel("optimizer steps")
    axes.set_xlim(0, run.num_steps)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if run.num_steps >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def legend(figure: Figure, axes: Axes) -> None:
    """Puts the legend of ``axes`` under the whole figure, so that it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, columnspacing=1.2)


def plain_ticks(axes: Axes) -> None:
    """Writes numbers in full, and at 1, 2 and 5 if the axis spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axes.get_ylim()
    if high > 10 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0), numticks=8))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
