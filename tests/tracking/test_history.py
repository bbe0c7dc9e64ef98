"""Lineage and schedule read back from events: those of a real clan, whole and cut in the middle."""

from __future__ import annotations

import pytest

from clantune_scale.core.lineage import Lineage
from clantune_scale.core.schedule import ClanSchedule
from clantune_scale.errors import ClanError
from clantune_scale.tracking import read_events
from clantune_scale.tracking.history import champion_of, lineage_from_events, schedule_from_events


def test_the_lineage_is_the_one_that_the_clan_kept(finished_run):
    lineage = lineage_from_events(read_events(finished_run.folder / "events.jsonl"))
    assert list(lineage) == list(finished_run.lineage)
    assert Lineage.from_json(lineage.to_json()).to_json() == lineage.to_json()


def test_the_schedule_is_the_one_that_was_written_at_the_end(finished_run):
    written = ClanSchedule.from_json((finished_run.folder / "schedule.json").read_text())
    read = schedule_from_events(read_events(finished_run.folder / "events.jsonl"))
    assert [s.values for s in read.segments] == [s.values for s in written.segments]
    assert [s.undone for s in read.segments] == [s.undone for s in written.segments]
    for step in range(written.num_steps):
        # The factor is recorded once a round and drawn through: floats of another order.
        assert read.lr_factor_at(step) == pytest.approx(written.lr_factor_at(step), abs=1e-12)


def test_half_a_run_has_the_first_half_of_the_lineage_and_a_champion_of_its_last_round(finished_run):
    events = read_events(finished_run.half / "events.jsonl")
    lineage = lineage_from_events(events)
    assert 1 <= len(lineage) < len(finished_run.lineage)
    assert list(lineage) == list(finished_run.lineage)[: len(lineage)]
    losses = lineage[-1].losses
    assert losses[champion_of(events)] == min(losses)
    assert schedule_from_events(events).num_steps == lineage[-1].end_step


def test_a_member_that_does_not_exist_is_refused(finished_run):
    with pytest.raises(ClanError, match=r"there is no member 9 in a clan of 2. Give 0 to 1"):
        schedule_from_events(read_events(finished_run.folder / "events.jsonl"), member=9)


def test_before_the_first_round_there_is_no_champion():
    with pytest.raises(ClanError, match="no round is finished"):
        champion_of([{"kind": "run_start"}])
