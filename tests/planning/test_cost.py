"""Samples, seconds and settings within a budget: by hand, and against a run that was really made."""

from __future__ import annotations

import pytest

from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.schedule import gene_from_plain
from clantune_scale.errors import ClanError
from clantune_scale.planning.budget import Size, fitting, forecast
from clantune_scale.planning.hardware import Hardware
from clantune_scale.planning.measured import measure
from clantune_scale.tracking import read_events

DS = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
LR = Gene("lr", relative=True)
DROPOUT = Gene("dropout", kind="specialized", scale="linear", bounds=(0.0, 0.5), initial=0.1)
# A million operations a second, links of a thousand bytes: numbers that can be checked by hand.
SLOW = Hardware(1e6, 1e9, 1e3, 1e2, 1e4, devices_per_node=4, compute_share=0.5, link_share=1.0)


def _forecast(hardware=None, measured=None, *, genes=(LR,), num_steps=100, world_size=8, **block):
    block = ClanConfig.model_validate({"population_size": 4, "strategy": "control", **block})
    size = Size((100,), tokens_per_sample=10)
    return forecast(
        DS, block, genes, size, world_size=world_size, num_steps=num_steps, hardware=hardware, measured=measured
    )


def test_a_clan_that_cooperates_loses_no_sample():
    cost = _forecast(round_length=20).cost
    assert (cost.num_rounds, cost.competitive_steps) == (5, 0)
    assert cost.samples == cost.unique_samples == 100 * 64
    assert cost.overhead_percent is None  # no time without hardware


def test_competitive_steps_see_a_share_of_the_batch_and_rolled_back_ones_nothing():
    kept = _forecast(strategy="classic", round_length=20, duty_cycle=0.1).cost
    assert (kept.competitive_steps, kept.undone_steps) == (10, 0)
    assert kept.samples - kept.unique_samples == 10 * 64 * 3 // 4
    undone = _forecast(genes=(DROPOUT,), strategy={"name": "clan", "options": {"growth": 0.0}}, duty_cycle=0.1).cost
    assert undone.undone_steps == undone.competitive_steps > 0
    assert undone.samples - undone.unique_samples == undone.undone_steps * 64


def test_a_trial_trains_each_group_on_the_clans_batch_in_teams_of_its_own():
    """Eight members in four teams of two: seconds of a race by hand, against those of the steps around it."""
    options = {"trial_cost": 0.6, "growth": 0.0, "freeze_at": 1.0}
    strategy = {"name": "clan", "options": options}
    one = _forecast(SLOW, population_size=8, strategy=strategy, total_steps=100)
    race = next(phase for phase, _ in one.walk.phases if phase.teams)
    assert (race.teams, race.batch_factor, race.num_steps) == ((0, 0, 1, 1, 2, 2, 3, 3), 4, 20)
    assert (one.cost.competitive_steps, one.cost.undone_steps) == (20, 0)
    assert one.cost.unique_samples == one.cost.samples == 100 * 64
    assert one.cost.trained_samples == (80 + 20 * 4) * 64
    micro_batch_s = 6 * 100 * 20 / 0.5e6
    # An all-reduce of 400 bytes over all eight on two nodes, or over two on one; every gather is a rank's own.
    steps_s = 80 * (4 * micro_batch_s + 2 * 7 / 8 * 400 / 400)
    race_s = 20 * (16 * micro_batch_s + 2 * 1 / 2 * 400 / 1000)
    assert one.cost.seconds["training"] == pytest.approx(steps_s + race_s)


def test_seconds_by_hand():
    one = _forecast(SLOW, round_length=50)
    # micro-batch 2 x accumulation 4 x 10 tokens, 6 operations per weight, half a million of them a second
    compute_s = 6 * 100 * 80 / 0.5e6
    assert one.job.accumulation == 4
    # An all-reduce of 100 floats over 8 ranks on two nodes, four links of 100 B/s between them; an all-gather over
    # the member's two ranks at 1000 B/s.
    sending_s = 2 * 7 / 8 * 400 / 400 + 1 / 2 * 400 / 1000
    assert one.cost.seconds["training"] == pytest.approx(100 * (compute_s + sending_s))
    plain_s = compute_s + (2 * 7 / 8 * 400 + 7 / 8 * 448) / 400  # its all-gather goes over all 8, padded to 16
    assert one.cost.plain_seconds == pytest.approx(100 * plain_s)
    assert one.cost.time_percent == pytest.approx(100 * (sum(one.cost.seconds.values()) / (100 * plain_s) - 1))


def test_a_step_on_the_line_is_a_plain_one_and_a_trial_one_for_each_that_takes_a_turn():
    strategy = {"name": "clan", "options": {"trial_cost": 0.6, "growth": 0.0, "freeze_at": 1.0}}
    settings = {"strategy": strategy, "total_steps": 100, "members": "line", "fitness": {"num_samples": 16}}
    one = _forecast(SLOW, population_size=8, **settings)
    assert (one.job.population_size, one.job.dp, one.job.points, one.job.accumulation) == (1, 8, 8, 4)
    assert (one.cost.competitive_steps, one.cost.trained_samples) == (20, (80 + 20 * 4) * 64)  # four teams
    assert one.cost.unique_samples == one.cost.samples == 100 * 64
    plain_s = one.cost.plain_seconds / 100
    assert plain_s == pytest.approx(6 * 100 * 80 / 0.5e6 + (2 * 7 / 8 * 400 + 7 / 8 * 448) / 400)
    assert one.cost.seconds["training"] == pytest.approx((80 + 20 * 4) * plain_s)
    # The start, eight points for each round that explores, four turns, one for each other round and champion.
    kinds = [4 if plan.phases[0].teams else 8 if plan.explores else 1 for plan in one.walk.ended]
    assert kinds.count(4) == 1 and kinds.count(8) >= 2
    assert one.cost.evaluated_samples == (1 + sum(kinds) + one.walk.num_champions) * 16
    window_s = 2 * 100 * 2 * 10 / 0.5e6 + (2 * 7 / 8 * 448 + 7 / 8 * 8 * 8) / 400
    assert one.cost.seconds["evaluation"] == pytest.approx((1 + sum(kinds) + one.walk.num_champions) * window_s)
    # A snapshot of masters, two moments and the average of 14 weights; nobody is cloned.
    assert one.cost.seconds["transfer"] == pytest.approx(one.walk.num_ended * (4 * 56 / 1e4))


def test_arrays_on_the_host_are_copied_there_and_back():
    device = _forecast(SLOW, strategy="clan", total_steps=100, members="line").cost.seconds
    line = {"store": "host", "average_every": 5}
    host = _forecast(SLOW, strategy="clan", total_steps=100, members="line", line=line)
    # Start, anchor, centre and average go and come once; the anchor and the average come for each of four points.
    more = host.walk.num_ended * (2 * 4 + 2 * 4) * 56 / 1e4
    assert host.cost.seconds["transfer"] - device["transfer"] == pytest.approx(more)
    # The weights go to the average in every fifth step.
    assert host.cost.seconds["training"] - device["training"] == pytest.approx(100 / 5 * 56 / 1e4)


def test_what_fits_a_budget_costs_at_most_that_and_the_rest_does_not():
    block = ClanConfig.model_validate({"population_size": 4, "strategy": "classic", "round_length": 20})
    how = {"world_size": 8, "num_steps": 100, "hardware": SLOW, "measured": None}
    size = Size((100,), tokens_per_sample=1000)
    fits = fitting(DS, block, (LR, DROPOUT), size, budget_percent=60.0, **how)
    chosen = {(one.population_size, one.duty_cycle) for one in fits}
    assert fits and all(one.cost.overhead_percent <= 60.0 for one in fits)
    assert {8 % one.population_size for one in fits} == {0}
    for population_size in (2, 4, 8):
        for duty in (0.0, 0.1, 0.3):
            other = block.model_copy(update={"population_size": population_size, "duty_cycle": duty})
            overhead = forecast(DS, other, (LR, DROPOUT), size, **how).cost.overhead_percent
            assert ((population_size, duty) in chosen) == (overhead <= 60.0)
    assert fits[0].population_size == max(one.population_size for one in fits)


def test_what_does_not_fit_the_device_is_left_out():
    block = ClanConfig.model_validate({"population_size": 4, "strategy": "control"})
    how = {"world_size": 8, "num_steps": 100, "hardware": SLOW, "measured": None}
    small = {**how, "hardware": Hardware(1e6, 1900, 1e3, 1e2, 1e4)}
    size = Size((100,), tokens_per_sample=1000)
    everything = fitting(DS, block, (LR,), size, budget_percent=1e9, **how)
    some = fitting(DS, block, (LR,), size, budget_percent=1e9, **small)
    # 100 weights and gradients of 4 bytes, masters and two moments of a shard: 800 + 1200 / dp.
    assert [one.population_size for one in everything] == [8, 4, 2]
    assert [one.population_size for one in some] == [4, 2]


def test_the_rounds_that_are_foretold_are_those_that_were(finished_run):
    """Their seconds are then the run's own means: what is left to chance is how busy the machine is."""
    events = read_events(finished_run.folder / "events.jsonl")
    rounds = [event for event in events if event["kind"] == "round_end"]
    phases = [phase for event in rounds for phase in event["phases"]]
    start, measured = events[0], measure(events)
    block = ClanConfig.model_validate(start["config"])
    genes = tuple(gene_from_plain(gene) for gene in start["genes"])
    one = forecast(
        {"train_micro_batch_size_per_gpu": 4},
        block,
        genes,
        Size((1208,)),
        world_size=2,
        num_steps=start["total_steps"],
        hardware=None,
        measured=measured,
    )
    assert one.cost.num_rounds == len(rounds)
    assert one.cost.competitive_steps == sum(p["num_steps"] for p in phases if p["kind"] == "competitive")
    assert one.cost.undone_steps == sum(p["num_steps"] for p in phases if not p["keeps"])
    later = rounds[1:]
    assert measured.evaluation_s == pytest.approx(sum(e["seconds"]["evaluation"] for e in later) / len(later))
    assert one.walk.num_evaluations == finished_run.num_evaluations
    assert one.cost.trained_samples == rounds[-1]["samples"]
    assert one.cost.seconds["evaluation"] == pytest.approx(measured.evaluation_s * finished_run.num_evaluations)
    assert one.cost.seconds["training"] == pytest.approx(
        measured.step_s * (one.cost.num_steps - one.cost.competitive_steps)
        + measured.competitive_step_s * one.cost.competitive_steps
    )


def test_evaluation_that_was_measured_is_scaled_by_samples_per_rank(finished_run):
    measured = measure(read_events(finished_run.folder / "events.jsonl"))
    assert measured.samples_per_rank == 64
    once = _forecast(measured=measured, fitness={"num_samples": 64}, world_size=4)
    twice = _forecast(measured=measured, fitness={"num_samples": 128}, world_size=4)
    assert twice.cost.seconds["evaluation"] == pytest.approx(2 * once.cost.seconds["evaluation"])
    assert twice.cost.seconds["training"] == once.cost.seconds["training"]


def test_a_longer_competitive_step_is_measured_by_the_share_of_the_batch_that_it_took(finished_run):
    """Or a race, whose steps are four shares long, would be paid for four times over."""
    events = read_events(finished_run.folder / "events.jsonl")
    as_it_was = measure(events)
    for phase in (phase for event in events if event["kind"] == "round_end" for phase in event["phases"]):
        phase["batch_factor"] = 4 if phase["kind"] == "competitive" else 1
    four_shares = measure(events)
    assert four_shares.competitive_step_s == pytest.approx(as_it_was.competitive_step_s / 4)
    assert four_shares.step_s == as_it_was.step_s


def _line_round(step: int, values: list[float], kind: str, **seconds: float) -> dict:
    members = [{"genome": {"values": {"lr": value}}} for value in values]
    phases = [{"kind": kind, "num_steps": 10, "batch_factor": 2}]
    return {"kind": "round_end", "step": step, "phases": phases, "members": members, "seconds": seconds}


def test_a_run_on_the_line_is_measured_by_the_point():
    start = {
        "kind": "run_start",
        "members": "line",
        "batch": {"dp_size": 2},
        "config": {"fitness": {"num_samples": 64}},
    }
    rounds = [
        _line_round(10, [1.0, 1.1], "cooperative", cooperative=99.0, evaluation=99.0),  # pays for the start
        _line_round(20, [1.0, 1.1], "cooperative", cooperative=5.0, evaluation=4.0, transfer=1.0),
        _line_round(30, [1.0, 9.0], "competitive", competitive=12.0, evaluation=0.0),
        _line_round(40, [1.0, 1.0], "cooperative", cooperative=5.0, evaluation=2.0, transfer=1.0),
    ]
    measured = measure([start, *rounds])
    assert (measured.step_s, measured.competitive_step_s, measured.evaluation_s) == (0.5 / 2, 0.5 / 2, 2.0)
    one = _forecast(measured=measured, strategy="clan", total_steps=100, members="line", fitness={"num_samples": 64})
    assert one.cost.seconds["training"] == pytest.approx(0.25 * one.cost.trained_samples / 64)
    num_windows = one.cost.evaluated_samples / 64
    assert one.cost.seconds["evaluation"] == pytest.approx(num_windows * 2.0 * (64 / 8) / 32)


def test_a_run_without_a_round_cannot_be_measured():
    with pytest.raises(ClanError, match="no finished round"):
        measure([{"kind": "run_start"}])
