"""The end of a run: who is best, and writing down what it takes to use it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clantune_scale.core.extras import is_installed, remedy
from clantune_scale.core.schedule import ClanSchedule
from clantune_scale.errors import ClanError
from clantune_scale.results.champion_formats import check_forms, keep
from clantune_scale.runtime.recorder import Summary
from clantune_scale.tracking import read_events

if TYPE_CHECKING:
    from clantune_scale.runtime.clan import Clan

__all__ = ["check_forms", "choose", "save", "write"]

_ARTIFACTS = {"safetensors": "champion", "dcp": "champion_dcp", "deepspeed": "champion_deepspeed"}


def choose(clan: Clan) -> Summary:
    """Measures every member's weights as they are, and its averaged weights where it has them; takes the best.

    Averaged weights stand in for a final decay of the learning rate where a run ends without one. All ranks
    of the clan call it, and choose alike.
    """
    losses = [clan.measurement.fitness(averaged=False).mean]
    if clan.measurement.has_averages:
        losses.append(clan.measurement.fitness(averaged=True).mean)
    table = np.stack(losses)
    averaged, member = np.unravel_index(int(np.argmin(table)), table.shape)
    best = float(table[averaged, member])
    return Summary(int(member) if np.isfinite(best) else None, best, bool(averaged), clan.recorder.run_dir)


def write(clan: Clan, summary: Summary) -> Summary:
    """Writes the champion's weights, its schedule and the picture of the genes into the run's folder.

    All ranks of the clan call it; the champion's write the weights, the clan's first rank the rest.

    Raises:
        ClanError: on all ranks, if the weights could not be written.
    """
    artifacts: dict[str, str] = {}
    run_dir, forms = summary.run_dir, clan.config.checkpoint.champion
    assert run_dir is not None, "all ranks know it"
    if summary.champion is not None and forms:
        written = keep(clan, summary.champion, run_dir, forms, averaged=summary.averaged)
        artifacts |= {_ARTIFACTS[form]: where for form, where in written.items()}
    if len(clan.recorder.lineage) and summary.champion is not None and run_dir is not None:
        schedule = ClanSchedule.from_lineage(
            clan.recorder.lineage, clan.genes, member=summary.champion, lr_factor=clan.strategy.lr_factor
        )
        artifacts["schedule"] = str(run_dir / "schedule.json")
        if is_installed("matplotlib"):
            artifacts["genes"] = str(run_dir / "genes.png")
        artifacts["lineage"] = str(run_dir / "lineage.json")
        if clan.world.is_clan_leader:
            (run_dir / "lineage.json").write_text(json.dumps(clan.recorder.lineage.to_json()))
            (run_dir / "schedule.json").write_text(schedule.to_json())
            _draw(clan)
    return replace(summary, artifacts=artifacts)


def save(clan: Clan, folder: Path | None = None) -> Path:
    """Writes the fittest member's weights while the run goes on; all ranks of the clan call it, between two steps.

    The member is the one with the lowest loss in the last evaluation, its weights those of now: the averaged ones
    where the strategy compares members by them.

    Args:
        clan: whose.
        folder: where to; ``champion-step-NNNNNNNN`` in the run's folder where None.

    Returns:
        The folder, which has its name only when everything is in it.

    Raises:
        ClanError: if no loss was finite, or the weights could not be written.
    """
    run_dir = clan.recorder.run_dir
    assert run_dir is not None, "all ranks know it"
    losses = np.where(np.isfinite(clan.fitness.mean), clan.fitness.mean, np.inf)
    member = int(np.argmin(losses))
    if not np.isfinite(losses[member]):
        raise ClanError(
            f"no member had a finite loss in the last evaluation ({clan.fitness.mean.tolist()}), so that none is the "
            f"best. Resume from an earlier round with a lower learning rate."
        )
    folder = folder or run_dir / f"champion-step-{clan.phases.position.step:08d}"
    part = folder.with_name(f".{folder.name}.partial")
    keep(clan, member, part, clan.config.checkpoint.champion or ["safetensors"], averaged=clan.measurement.has_averages)
    if clan.member == member and clan.world.at.member_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    clan.world.replica_group.gather_json(None)
    return folder


def _draw(clan: Clan) -> None:
    if not is_installed("matplotlib"):
        logging.getLogger(__name__).warning(
            "matplotlib is not installed, and the picture of the genes is not drawn. %s", remedy("matplotlib")
        )
        return
    # Matplotlib takes a second to import: only the one process that draws pays for it, and at the end.
    from clantune_scale.tracking.plots import plot_genes

    run_dir = clan.recorder.run_dir
    assert run_dir is not None, "the clan's leader made it"
    plot_genes(read_events(run_dir / "events.jsonl"), run_dir / "genes.png")
