"""A run as one page that explains itself: ``clantune report RUN``, from the events alone, alive or finished."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from clantune_scale.core.extras import require
from clantune_scale.errors import ClanError
from clantune_scale.tracking.events import iter_events
from clantune_scale.tracking.report.canvas import Drawing, render
from clantune_scale.tracking.report.coherence import coherence
from clantune_scale.tracking.report.collect import read_run
from clantune_scale.tracking.report.costs import costs
from clantune_scale.tracking.report.family import family
from clantune_scale.tracking.report.fitness import fitness, gaps
from clantune_scale.tracking.report.genes import step_sizes, trajectory
from clantune_scale.tracking.report.page import page
from clantune_scale.tracking.report.schedule import found
from clantune_scale.tracking.report.series import Run

__all__ = ["write_report"]


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Writes ``report.html``, and its pictures as PNGs into ``figures``, into the run's folder.

    Earlier ones are replaced, each file in one move, so that a browser (or an upload) never finds half of one.

    Args:
        run_dir: folder that holds ``events.jsonl``; the run may still be going.

    Returns:
        Path of the page.

    Raises:
        ClanError: if there is no events file in it, no round was finished, or matplotlib is not installed.
    """
    require("matplotlib", needed_by="the report")
    folder = Path(run_dir)
    events = folder / "events.jsonl"
    if not events.is_file():
        raise ClanError(f"there is no {events}. Give the folder of a run.")
    run = read_run(iter_events(events), where=events)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".report-") as scratch:
        pictures = [(drawing, render(drawing, Path(scratch))) for drawing in drawings(run)]
        for drawing, _ in pictures:
            os.replace(Path(scratch) / f"{drawing.name}.png", figures / f"{drawing.name}.png")
        written = Path(scratch) / "report.html"
        written.write_text(page(run, pictures), encoding="utf-8")
        os.replace(written, folder / "report.html")
    return folder / "report.html"


def drawings(run: Run) -> list[Drawing]:
    """The report's pictures, in order."""
    drawn = [fitness(run), gaps(run)]
    drawn += [trajectory(run, gene, number=number) for number, gene in enumerate(run.genes)]
    drawn += [step_sizes(run)] if run.genes else []
    drawn += [found(run), family(run), costs(run)]
    together = coherence(run)
    return drawn if together is None else [*drawn, together]
