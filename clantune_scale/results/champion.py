"""The end of a run: chooses the champion and writes its weights, its schedule and the plot of the genes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from clantune_scale.checkpoint.run_state import RunProgress
from clantune_scale.core.extras import is_installed, remedy
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.schedule import ClanSchedule
from clantune_scale.errors import ClanError
from clantune_scale.results.champion_formats import ChampionWeights, MeasuredView, write_weights
from clantune_scale.tracking import read_events

_ARTIFACTS = {"safetensors": "champion", "dcp": "champion_dcp", "deepspeed": "champion_deepspeed"}


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        champion: the fittest member, or None if no loss was finite.
        champion_loss: its mean loss on the validation window.
        averaged: whether the champion's weights are its averaged ones, which were better than its last ones.
        run_dir: the run's folder.
        artifacts: by name, files on the host that wrote them (the champion's own for its weights).
    """

    champion: int | None
    champion_loss: float
    averaged: bool = False
    run_dir: Path | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)


class Measures(Protocol):
    """Compares the members of a clan; all its ranks call each method.

    Attributes:
        has_averages: whether averaged weights are up to date.
    """

    @property
    def has_averages(self) -> bool: ...

    def fitness(self, *, averaged: bool) -> Fitness:
        """The members' losses with their last weights, or with their averaged ones."""

    def weights(self, *, averaged: bool) -> AbstractContextManager[None]:
        """Inside, each member's model computes with its last weights, or with its averaged ones."""


@dataclass(frozen=True)
class MeasuredRun:
    """A run whose members can be compared.

    Attributes:
        view: the clan on this rank.
        progress: of the run.
        measurement: compares the members.
        run_dir: the run's folder.
    """

    view: MeasuredView
    progress: RunProgress
    measurement: Measures
    run_dir: Path

    def weights(self, member: int, *, averaged: bool) -> ChampionWeights:
        """A member's weights, to be written."""
        return ChampionWeights(member, averaged, self.measurement.weights(averaged=averaged), self.run_dir)


def choose(run: MeasuredRun) -> Summary:
    """Measures every member's last weights, and its averaged weights if it has them; chooses the best.

    Averaged weights take the place of a final decay of the learning rate if a run ends without one. All ranks of
    the clan call it and choose alike.
    """
    losses = [run.measurement.fitness(averaged=False).mean]
    if run.measurement.has_averages:
        losses.append(run.measurement.fitness(averaged=True).mean)
    table = np.stack(losses)
    averaged, member = np.unravel_index(int(np.argmin(table)), table.shape)
    best = float(table[averaged, member])
    return Summary(int(member) if np.isfinite(best) else None, best, bool(averaged), run.run_dir)


def write(run: MeasuredRun, summary: Summary) -> Summary:
    """Writes the champion's weights, its schedule and the plot of the genes into the run's folder.

    All ranks of the clan call it; the champion's write the weights, the clan's first rank the rest.

    Returns:
        The summary, with the artifacts.

    Raises:
        ClanError: on all ranks, if the weights could not be written.
    """
    if summary.champion is None:
        return summary
    view, lineage, run_dir = run.view, run.progress.lineage, run.run_dir
    artifacts: dict[str, str] = {}
    forms = view.config.checkpoint.champion
    if forms:
        written = write_weights(view, run.weights(summary.champion, averaged=summary.averaged), run_dir, forms)
        artifacts |= {_ARTIFACTS[form]: path for form, path in written.items()}
    if len(lineage):
        schedule = ClanSchedule.from_lineage(
            lineage, view.genes, member=summary.champion, lr_factor=view.strategy.lr_factor
        )
        artifacts["schedule"] = str(run_dir / "schedule.json")
        if is_installed("matplotlib"):
            artifacts["genes"] = str(run_dir / "genes.png")
        artifacts["lineage"] = str(run_dir / "lineage.json")
        if view.world.is_clan_leader:
            (run_dir / "lineage.json").write_text(json.dumps(lineage.to_json()))
            (run_dir / "schedule.json").write_text(schedule.to_json())
            _plot(run_dir)
    return replace(summary, artifacts=artifacts)


def save(run: MeasuredRun, folder: Path | None = None) -> Path:
    """Writes the fittest member's weights while the run goes on; all ranks of the clan call it, between two steps.

    The member is the one with the lowest loss in the last evaluation. Its weights are the present ones: the averaged
    weights if the strategy compares members by them.

    Args:
        run: whose.
        folder: where to; None for ``champion-step-NNNNNNNN`` in the run's folder.

    Returns:
        The folder, which gets its name only when everything is in it.

    Raises:
        ClanError: if no loss was finite, or the weights could not be written.
    """
    view, losses = run.view, run.progress.fitness.mean
    finite = np.where(np.isfinite(losses), losses, np.inf)
    member = int(np.argmin(finite))
    if not np.isfinite(finite[member]):
        raise ClanError(
            f"no member had a finite loss in the last evaluation ({losses.tolist()}), so there is no best member. "
            f"Resume from an earlier round with a lower learning rate."
        )
    folder = folder or run.run_dir / f"champion-step-{view.phases.position.step:08d}"
    part = folder.with_name(f".{folder.name}.partial")
    forms = view.config.checkpoint.champion or ["safetensors"]
    if view.has_one_state:
        member = 0
    write_weights(view, run.weights(member, averaged=run.measurement.has_averages), part, forms)
    if view.member == member and view.world.at.member_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    view.world.replica_group.gather_json(None)
    return folder


def _plot(run_dir: Path) -> None:
    if not is_installed("matplotlib"):
        logging.getLogger(__name__).warning(
            "matplotlib is not installed, so the genes are not plotted. %s", remedy("matplotlib")
        )
        return
    # Matplotlib takes a second to import, so only the process that plots imports it, at the run's end.
    from clantune_scale.tracking.plots import plot_genes

    try:
        plot_genes(read_events(run_dir / "events.jsonl"), run_dir / "genes.png")
    # A picture may fail in as many ways as there are fonts, disks and names. The run has its results without it.
    except Exception as error:
        logging.getLogger(__name__).warning(
            "the genes are not plotted (%s: %s). Plot them later: clantune report %s",
            type(error).__name__,
            error,
            run_dir,
        )
