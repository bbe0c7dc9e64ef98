"""A real run for the commands: a clan of two trained through DeepSpeed once, and a copy that was cut in the middle."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from clantune_scale.core.lineage import Lineage
from clantune_scale.runtime.validation_window import ValidationWindow
from tests.backends.small_runs import ds_config, in_member_worlds
from tests.ranks import run_ranks
from tests.small_clans import clan_config, start, train

NUM_STEPS = 40
GENES = {"lr": {"step_size": 0.3}, "beta1": {}, "dropout": {"initial": 0.1}}


@dataclass(frozen=True)
class FinishedRun:
    """Where it is, and what the clan itself knew.

    Attributes:
        folder: of the whole run.
        half: a folder with the first half of its events, the last line torn.
        lineage: the clan's own.
        num_evaluations: how often a rank was asked for the losses of the validation window.
    """

    folder: Path
    half: Path
    lineage: Lineage
    num_evaluations: int


def _job(rank: int, config: dict) -> tuple[str, Lineage, int]:
    losses, calls = ValidationWindow.losses, []
    ValidationWindow.losses = lambda *args: calls.append(rank) or losses(*args)
    engine, loader = start(config, dropout=0.1)
    train(engine, loader, NUM_STEPS)
    engine.clan.finish()
    return str(engine.clan.recorder.run_dir), engine.clan.progress.lineage, len(calls)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Two members of one rank, 40 steps, rounds of both kinds, a final decay."""
    parent = tmp_path_factory.mktemp("runs")
    config = clan_config(
        parent,
        ds_config(1, clip=0.5),
        genes=GENES,
        duty_cycle=0.4,
        total_steps=NUM_STEPS,
        checkpoint={"champion": True},
    )
    os.environ.setdefault("MPLBACKEND", "agg")
    folder, lineage, num_evaluations = run_ranks(2, in_member_worlds, _job, config)[0]
    half = parent / "half"
    half.mkdir()
    lines = (Path(folder) / "events.jsonl").read_text().splitlines(keepends=True)
    kept = lines[: len(lines) // 2]
    (half / "events.jsonl").write_text("".join(kept) + lines[len(kept)][:40])
    return FinishedRun(Path(folder), half, lineage, num_evaluations)
