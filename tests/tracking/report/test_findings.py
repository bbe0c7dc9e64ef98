"""What the report says, against runs of which it is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies.clan.overfitting import OVERFITS
from clantune_scale.tracking.report import findings
from clantune_scale.tracking.report.collect import read_run
from clantune_scale.tracking.report.family import survivors
from clantune_scale.tracking.report.influence import influence
from clantune_scale.tracking.report.schedule import along, rates
from tests.tracking import simulated_run

LR, DROPOUT = simulated_run.GENES


def run_of(**kwargs):
    return read_run(simulated_run.events(**kwargs), where=Path("events.jsonl"))


def moved(consensus, *, gene=LR, frozen_after=None):
    """A run in which the clan's value was this, round by round, and no more is said."""
    run = run_of(num_rounds=len(consensus), num_members=4, frozen_after=frozen_after)
    run.consensus[gene.name] = np.array(consensus, dtype=float)
    return run


@pytest.fixture(scope="module")
def long_run():
    return run_of(num_rounds=120, num_members=8)


def test_the_gene_that_the_loss_follows_mattered_and_the_other_did_not(long_run):
    assert influence(long_run, LR).is_clear and influence(long_run, LR).explained > 0.3
    assert not influence(long_run, DROPOUT).is_clear
    assert any(line.startswith("It mattered") for line in findings.of_gene(long_run, LR))
    assert any(line.startswith("No clear effect") for line in findings.of_gene(long_run, DROPOUT))
    advice = findings.next_run(long_run)
    assert advice[0].startswith("Multiply your own lr by") and advice[1].startswith("Remove dropout")


def test_two_members_cannot_tell():
    run = run_of(num_rounds=6, num_members=2)
    assert influence(run, LR).explained is None
    assert "2 members and 6 rounds are too few to tell" in " ".join(findings.of_gene(run, LR))


def test_a_rollback_discards_training_back_to_the_snapshot():
    events = list(simulated_run.events(num_rounds=5, num_members=4))
    ends = [event for event in events if event["kind"] == "round_end"]
    ends[2]["kept"] = False
    ends[3] |= {"restored": True, "kept": False}
    run = read_run(events, where=Path("events.jsonl"))
    assert run.undone.tolist() == [False, False, True, True, False]
    given_up = ends[3]["step"] - ends[2]["start_step"]
    assert f"The training of {given_up:,} steps was discarded" in " ".join(findings.health(run))


def test_a_run_that_overfits_is_said_to_be():
    events = list(simulated_run.events(num_rounds=3, num_members=4))
    assert "overfits" not in " ".join(findings.health(read_run(events, where=Path("events.jsonl"))))
    end = [event for event in events if event["kind"] == "round_end"][1]
    end["members"][0]["reason"] = f"fittest; lr +0.100 (minimum); {OVERFITS}"
    said = " ".join(findings.health(read_run(events, where=Path("events.jsonl"))))
    assert f"In 1 round the validation loss did not follow the training loss (at steps {end['step']:,})" in said


def test_movement_is_counted_in_the_genes_scale():
    run = moved([1.0, math.exp(0.8), math.exp(1.6), math.exp(1.7)])
    assert influence(run, LR).moves == pytest.approx([0.8, 0.8, 0.1])
    text = " ".join(findings.of_gene(run, LR))
    assert (
        "from 1 to 5.474, a factor of 5.47" in text
        and "In 2 of 3 decisions it changed by the limit, `max_change`" in text
    )


def test_a_gene_that_still_moves_at_the_freeze_is_reported():
    climbing = [math.exp(0.7 * index) for index in range(5)] + [math.exp(2.8)] * 3
    text = " ".join(findings.of_gene(moved(climbing, frozen_after=4), LR))
    assert "still moving when genes froze at step 80 (by +0.7 in the last decision)" in text
    swinging = [1.0, math.exp(0.8), 1.0, math.exp(0.8), math.exp(0.8)]
    assert "oscillated when genes froze" in " ".join(findings.of_gene(moved(swinging, frozen_after=3), LR))
    still = [1.0, 1.5, 1.55, 1.56, 1.56]
    assert "had converged" in " ".join(findings.of_gene(moved(still, frozen_after=3), LR))


def test_bounds_that_were_hit_are_named():
    run = moved([0.1, 0.2, 0.3], gene=DROPOUT)
    run.values["dropout"][:] = [[0.3, 0.299, 0.1, 0.1]] * 3
    told = influence(run, DROPOUT)
    assert (told.at_high, told.at_low) == (0.5, 0.0)
    assert "upper bound 0.3 in 50% of the members' rounds" in " ".join(findings.of_gene(run, DROPOUT))


def test_a_gene_that_hardly_moved():
    run = moved([1.0, 1.001, 1.002])
    assert any(line.startswith("It hardly moved") for line in findings.of_gene(run, LR))


def test_the_schedule_it_started_from_is_the_users_own(long_run):
    found, began = rates(long_run)
    assert began == pytest.approx(np.full(120, 1e-3)) and found == pytest.approx(
        1e-3 * along(long_run, long_run.values["lr"])
    )
    moving = replace(long_run, scheduled_rate=np.linspace(2e-3, 0, 120), lr_factor=np.full(120, 0.5))
    assert rates(moving)[1] == pytest.approx(np.linspace(2e-3, 0, 120))


def test_where_events_do_not_say_what_the_users_schedule_did_it_follows_from_the_genes(long_run):
    silent = replace(long_run, scheduled_rate=np.full(120, np.nan))
    assert rates(silent)[1] == pytest.approx(np.full(120, 1e-3))
    absolute = replace(silent, genes=(Gene("lr", initial=0.25),))
    assert rates(absolute)[1] == pytest.approx(np.full(120, 0.25))


def test_ancestry_and_survivors_follow_the_donors():
    run = run_of(num_rounds=3, num_members=4)
    run.donors[:] = [[0, 0, 2, 3], [0, 1, 1, 3], [0, 1, 2, 2]]
    assert run.ancestry(3).tolist() == [0, 1, 2]
    assert survivors(run).tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
    ]


def test_the_freeze_is_the_round_after_the_last_that_explored():
    assert run_of(num_rounds=6, num_members=4, frozen_after=4).frozen_round == 4
    assert run_of(num_rounds=6, num_members=4).frozen_round is None


def test_events_without_the_newer_fields_are_enough():
    def old():
        for event in simulated_run.events(num_rounds=4, num_members=4):
            for name in ("throughput", "samples", "tokens", "straggler", "explores"):
                event.pop(name, None)
            for member in event.get("members", ()):
                for name in ("gradient_norm", "drift", "alignment", "strikes"):
                    member.pop(name)
            yield event

    run = read_run(old(), where=Path("events.jsonl"))
    assert not run.has("drift") and run.frozen_round is None and run.samples is None
    assert findings.health(run) == [
        "The clan was never rolled back.",
        "Evaluation and transfer took 25.0% of 12 s.",
    ]
