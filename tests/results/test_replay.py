"""A clan's schedule replayed without a clan, against the members that found it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from clantune_scale.core.schedule import ClanSchedule, Segment
from clantune_scale.core.stretch import stretched
from clantune_scale.results.replay import ClanScheduleLR
from clantune_scale.runtime.between_steps import BetweenSteps
from clantune_scale.runtime.genome_application import Expression
from clantune_scale.tracking import read_events
from clantune_scale.tracking.history import champion_of, schedule_from_events
from tests.backends.small_runs import Net, ds_config, flat_weights, in_member_worlds
from tests.ranks import run_ranks
from tests.runtime.test_genome_application import backend_with
from tests.small_clans import clan_config, flat_run, start, train

NUM_STEPS = 30
LR = {"name": "lr", "bounds": [0.1, 10], "relative": True}
BETA1 = {"name": "beta1", "bounds": [0.5, 0.99], "scale": "logit", "initial": 0.9}
DECAY = {"name": "weight_decay", "bounds": [0.1, 10], "relative": True, "groups": ["head"]}


def _optimizer(**options) -> torch.optim.AdamW:
    body, head = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": body.parameters(), "name": "body"}, {"params": head.parameters(), "name": "head"}]
    return torch.optim.AdamW(groups, **{"lr": 0.1, "weight_decay": 0.5, **options})


@pytest.fixture
def schedule() -> ClanSchedule:
    return ClanSchedule(
        (LR, BETA1, DECAY),
        (
            Segment(0, 2, {"lr": 2.0, "beta1": 0.8, "weight_decay": 3.0}),
            Segment(2, 6, {"lr": 4.0, "beta1": 0.6, "weight_decay": 1.5}, (1.0, 0.0)),
        ),
    )


def _advance(scheduler: ClanScheduleLR, num_steps: int) -> None:
    for _ in range(num_steps):
        scheduler.optimizer.step()
        scheduler.step()


def test_rates_and_the_other_genes_follow_the_schedule_in_their_groups(schedule):
    optimizer = _optimizer()
    scheduler = ClanScheduleLR(optimizer, schedule)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.2] == scheduler.get_last_lr()
    assert [g["betas"] for g in optimizer.param_groups] == [(0.8, 0.999)] * 2
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 1.5]
    _advance(scheduler, 3)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.1 * 4 * 0.75)
    assert optimizer.param_groups[1]["weight_decay"] == 0.75  # of the first value, not of the last


def test_your_own_schedule_goes_beside_it(schedule):
    scheduler = ClanScheduleLR(_optimizer(), schedule, own=lambda step: 0.5**step)
    _advance(scheduler, 1)
    assert scheduler.get_last_lr()[0] == 0.1 * 0.5 * 2.0


def _falling(step: int) -> float:
    return (1.0, 1.0, 0.9, 0.9, 0.2, 0.1)[min(step, 5)]


@pytest.mark.parametrize(
    "gene", [LR, {"name": "lr", "bounds": [0.1, 10], "initial": 1.0}], ids=["relative", "absolute"]
)
def test_rates_are_those_of_the_clans_own_updates_to_the_last_bit(gene, schedule):
    schedule = replace(schedule, genes=(gene, BETA1, DECAY))
    scheduler = ClanScheduleLR(_optimizer(), schedule, own=_falling)
    backend = backend_with(weight_decay=0.5)
    theirs = torch.optim.lr_scheduler.LambdaLR(backend.optimizer, _falling)
    expression = Expression(schedule.described_genes, backend, {})
    ceilings = set()
    for step in range(7):
        names = [described.name for described in schedule.described_genes]
        expression.express({name: schedule.value_at(name, step) for name in names})
        seen = backend.update(expression, schedule.lr_factor_at(step))
        assert [group["lr"] for group in seen] == scheduler.get_last_lr()
        ceilings.add(seen[0]["lr"] < 0.1 * _falling(step) * schedule.value_at("lr", step))
        theirs.step(), _advance(scheduler, 1)
    # 0.9 x (1, 0.75, 0.5, 0.25, 0) from step 2 on: step 3 is on the line, step 4 on the schedule below it.
    assert ceilings == {True, False}


def test_the_factor_for_another_batch_is_on_every_rate_throughout(schedule):
    one, four = (ClanScheduleLR(_optimizer(), stretched(schedule, factor=f), own=_falling) for f in (1.0, 4.0))
    for _ in range(6):
        assert four.get_last_lr() == pytest.approx([4 * rate for rate in one.get_last_lr()])
        _advance(one, 1), _advance(four, 1)


def test_two_genes_on_one_value_follow_one_another(schedule):
    head = {"name": "lr:head", "target": "lr", "bounds": [0.1, 10], "relative": True, "groups": ["head"]}
    both = ClanSchedule((LR, head), (Segment(0, 5, {"lr": 2.0, "lr:head": 3.0}),))
    assert ClanScheduleLR(_optimizer(), both).get_last_lr() == [0.2, 0.1 * 2.0 * 3.0]


def test_the_state_is_one_integer_and_goes_on_from_it(schedule):
    first = ClanScheduleLR(_optimizer(), schedule)
    _advance(first, 3)
    assert first.state_dict() == {"last_epoch": 3}
    second = ClanScheduleLR(_optimizer(), schedule)
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr() == first.get_last_lr()
    assert second.optimizer.param_groups[1]["betas"] == (0.6, 0.999)
    _advance(first, 1), _advance(second, 1)
    assert second.get_last_lr() == first.get_last_lr()


def test_an_optimizer_that_was_saved_brings_the_first_values_along(schedule):
    first = ClanScheduleLR(_optimizer(), schedule)
    _advance(first, 3)
    optimizer = _optimizer()
    optimizer.load_state_dict(first.optimizer.state_dict())
    resumed = ClanScheduleLR(optimizer, schedule, last_epoch=2)
    assert resumed.get_last_lr() == first.get_last_lr()
    assert optimizer.param_groups[1]["weight_decay"] == 0.75


class _Engine:
    """What a backend shows of an engine, as far as genes between steps need it."""

    def __init__(self) -> None:
        self.module, self.clip, self.accumulation, self.num_steps = nn.Sequential(nn.Dropout(0.3)), 1.0, 2, 0

    def param_groups(self) -> list:
        return []


def test_clip_accumulation_dropout_and_setters_are_set_between_steps():
    genes = (
        {"name": "clip", "bounds": [0.1, 10]},
        {"name": "accumulation", "bounds": [1, 8], "integer": True, "kind": "specialized"},
        {"name": "dropout", "bounds": [0, 0.5], "scale": "linear", "initial": 0.1, "kind": "specialized"},
        {"name": "temperature", "bounds": [0.1, 10]},
        LR,
    )
    values = {"clip": 0.5, "accumulation": 4.0, "dropout": 0.2, "temperature": 1.5, "lr": 2.0}
    engine, heard = _Engine(), []
    later = {**values, "dropout": 0.4}
    schedule = ClanSchedule(genes, (Segment(0, 1, values), Segment(1, 2, later)))
    between = BetweenSteps(engine, schedule, {"temperature": heard.append})
    between.apply()
    assert (engine.clip, engine.accumulation, engine.module[0].p, heard) == (0.5, 4, 0.2, [1.5])
    engine.num_steps = 1
    between.apply()
    assert engine.module[0].p == 0.4
    between.restore()
    assert (engine.clip, engine.accumulation, engine.module[0].p) == (1.0, 2, 0.3)


def _clan(rank: int, config: dict) -> tuple[str, int, torch.Tensor]:
    engine, loader = start(config)
    train(engine, loader, NUM_STEPS)
    return str(engine.clan.recorder.run_dir), engine.clan.member, flat_weights(engine)


def _replay(rank: int, config: dict, schedule_json: str) -> torch.Tensor:
    """Plain DeepSpeed on all ranks, the data in the clan's order, the schedule as a client scheduler."""
    schedule = ClanSchedule.from_json(schedule_json)
    return flat_run(config, NUM_STEPS, lr_scheduler=lambda optimizer: ClanScheduleLR(optimizer, schedule))[0]


def _distances(genes: dict, directory: str, **block: Any) -> tuple[float, float]:
    """How far from the champion the replay ends, and a run without the schedule, as shares of the champion's way."""
    config = ds_config(1, clip=0.5)
    clan = clan_config(directory, config, genes=genes, population_size=4, **block)
    results = run_ranks(4, in_member_worlds, _clan, clan)
    events = read_events(os.path.join(results[0][0], "events.jsonl"))
    schedule = schedule_from_events(events)
    assert schedule.num_steps == NUM_STEPS
    champion = next(weights for _, member, weights in results if member == champion_of(events))
    begin = torch.cat([parameter.detach().flatten() for parameter in Net().parameters()])
    unchanged = ClanSchedule((LR,), (Segment(0, NUM_STEPS, {"lr": 1.0}),))
    ends = [run_ranks(4, in_member_worlds, _replay, config, s.to_json())[0] for s in (schedule, unchanged)]
    replayed, without = (float((end - champion).norm() / (champion - begin).norm()) for end in ends)
    print(f"replay {replayed:.1e}, without the schedule {without:.1e}")
    return replayed, without


# Shared gradients come from members at other points than the champion, so that a replay is close and not equal: its
# distance grows with the spread of the members. Seen as shares of the champion's way; a bound leaves a factor of two.
SEEN = {0.01: 0.0031, 0.1: 0.032, 0.3: 0.091}


@pytest.mark.parametrize("spread", [0.1, *(pytest.param(s, marks=pytest.mark.slow) for s in SEEN if s != 0.1)])
def test_a_replay_ends_near_the_champion_by_a_share_of_the_spread(spread, tmp_path):
    genes = {"lr": {"step_size": spread}, "beta1": {"step_size": spread}}
    replayed, without = _distances(genes, str(tmp_path), strategy={"name": "clan", "options": {"growth": 0.0}})
    assert replayed < 2 * SEEN[spread]
    assert replayed < 0.2 * without


def test_where_members_do_not_differ_a_replay_is_exact_but_for_the_order_of_sums(tmp_path):
    genes = {"lr": {"initial": 3.0}, "beta1": {"initial": 0.7}, "weight_decay": {"initial": 5.0}}
    replayed, without = _distances(genes, str(tmp_path), strategy="control")
    assert replayed < 1e-6  # 30 steps of float32; seen 1e-7
    assert without > 0.1
