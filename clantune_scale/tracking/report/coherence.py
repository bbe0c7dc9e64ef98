"""Drawing: distance between members, and agreement of their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clantune_scale.tracking.report import canvas
from clantune_scale.tracking.report.canvas import Drawing
from clantune_scale.tracking.report.series import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {
    "drift": "drift",
    "alignment": "alignment",
    "gradient_norm": "gradient norm",
}


def coherence(run: Run) -> Drawing | None:
    """A panel for each of drift, alignment and gradient norm that the events have; None if they have none."""
    present = {name: label for name, label in _PANELS.items() if run.has(name)}
    if not present:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(present), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, label) in zip(panels, present.items(), strict=True):
            with canvas.panel(axes, run, label):
                canvas.members(axes, run, run.measured[name])
                positive = run.measured[name][run.measured[name] > 0]
                if name != "alignment" and positive.size and positive.max() > 10 * positive.min():
                    axes.set_yscale("log", nonpositive="mask")
        for axes in panels[:-1]:
            axes.set_xlabel("")
        canvas.legend(figure, panels[0])

    meanings = {
        "drift": "Drift: distance of a member's weights from the clan's mean, as a share of that mean's norm, before "
        "states are copied.",
        "alignment": "Alignment: cosine of a member's own gradient with the clan's mean, in the cooperative phase's "
        "last step; 1 means the same direction.",
        "gradient_norm": "Gradient norm: mean over the round, before clipping.",
    }
    caption = " ".join(meanings[name] for name in present) + canvas.shading_note(run)
    notes = canvas.thinning_notes(run)
    return Drawing("coherence", "Drift and alignment", caption, draw, rows=0.85 * len(present) + 0.2, notes=notes)
