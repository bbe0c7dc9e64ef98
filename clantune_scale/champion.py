"""The end of a run: who is best, and writing down what it takes to use it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from safetensors.torch import save_file

from clantune_scale.core.schedule import ClanSchedule
from clantune_scale.record import Summary
from clantune_scale.tracking import read_events

if TYPE_CHECKING:
    from clantune_scale.clan import Clan


def choose(clan: Clan) -> Summary:
    """Measures every member's weights as they are, and its averaged weights where it has them; takes the best.

    Averaged weights stand in for a final decay of the learning rate where a run ends without one. All ranks
    of the clan call it, and choose alike.
    """
    losses = [clan.measure(averages=False).mean]
    if clan.keeps_averages:
        losses.append(clan.measure(averages=True).mean)
    table = np.stack(losses)
    averaged, member = np.unravel_index(int(np.argmin(table)), table.shape)
    best = float(table[averaged, member])
    return Summary(int(member) if np.isfinite(best) else None, best, bool(averaged), clan.recorder.run_dir)


def write(clan: Clan, summary: Summary) -> Summary:
    """Writes the champion's weights, its schedule and the picture of the genes into the run's folder.

    All ranks of the clan call it; the champion's first rank writes the weights, the clan's first the rest.
    """
    artifacts: dict[str, str] = {}
    run_dir = summary.run_dir
    if summary.champion is not None and clan.config.checkpoint.champion:
        weights = run_dir / "champion.safetensors" if run_dir is not None else None
        context = clan.averaged_weights() if summary.averaged else nullcontext()
        with context:
            tensors = clan.backend.full_weights() if clan.member == summary.champion else None
        if tensors is not None and weights is not None:
            save_file(tensors, weights, metadata={"format": "pt", "averaged": str(summary.averaged).lower()})
            # safetensors writes through a private temporary file: readable as the run's other files are.
            weights.chmod(0o644)
        # The meeting makes sure that the file is there before anyone is told of it.
        clan.world.column.gather_json(None)
        artifacts["champion"] = str(weights)
    if len(clan.recorder.lineage) and summary.champion is not None and run_dir is not None:
        schedule = ClanSchedule.from_lineage(
            clan.recorder.lineage, clan.genes, member=summary.champion, lr_factor=clan.strategy.lr_factor
        )
        artifacts["schedule"] = str(run_dir / "schedule.json")
        artifacts["genes"] = str(run_dir / "genes.png")
        artifacts["lineage"] = str(run_dir / "lineage.json")
        if clan.world.is_clan_leader:
            (run_dir / "lineage.json").write_text(json.dumps(clan.recorder.lineage.to_json()))
            (run_dir / "schedule.json").write_text(schedule.to_json())
            _draw(clan)
    return replace(summary, artifacts=artifacts)


def _draw(clan: Clan) -> None:
    # Matplotlib takes a second to import: only the one process that draws pays for it, and at the end.
    from clantune_scale.tracking.plots import plot_genes

    run_dir = clan.recorder.run_dir
    assert run_dir is not None, "the clan's leader made it"
    plot_genes(read_events(run_dir / "events.jsonl"), run_dir / "genes.png")
