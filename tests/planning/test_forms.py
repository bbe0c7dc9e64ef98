"""The four forms of a run side by side: bytes and seconds by hand, and why one is impossible."""

from __future__ import annotations

import pytest

from clantune_scale.planning.budget import Size, forecast
from clantune_scale.planning.forms import forms_of
from clantune_scale.planning.hardware import Hardware
from clantune_scale.planning.preflight import preflight

# A million operations a second, links of a thousand bytes: numbers that can be checked by hand.
SLOW = Hardware(1e6, 1e9, 1e3, 1e2, 1e4, devices_per_node=4, compute_share=0.5, link_share=1.0)
TRIAL = {"name": "clan", "options": {"trial_cost": 0.6, "growth": 0.0, "freeze_at": 1.0}}
DS = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "zero_optimization": {"stage": 1}}


def _forms(*, world_size: int = 8, hardware: Hardware | None = None, ds=DS, **block):
    config = ds | {"clantune": {"population_size": 4, "total_steps": 100, "genes": ["lr"]} | block}
    size, how = Size((440,), tokens_per_sample=10), {"hardware": hardware, "measured": None}
    found = preflight(config, world_size=world_size)
    assert found.errors == []
    how |= {"world_size": world_size, "num_steps": 100}
    one = forecast(found.ds_config, found.block, found.genes, size, **how)
    return forms_of(config, one, size, model=None, **how)


@pytest.mark.parametrize("chosen", ["groups", "line"])
def test_bytes_of_a_rank_by_hand_whatever_form_is_chosen(chosen):
    forms = _forms(members=chosen, strategy=TRIAL)
    memory = {name: form.memory for name, form in forms.items()}
    # 440 weights, padded to 440 over a member's two ranks and to 448 over all eight.
    member, world = 220 * 4, 56 * 4
    assert [memory[name].masters for name in ("groups", "line", "plain", "hsdp")] == [member, world, world, member]
    assert [memory[name].moments for name in ("groups", "line", "plain", "hsdp")] == [
        2 * member, 2 * world, 2 * world, 2 * member,
    ]  # fmt: skip
    assert [memory[name].average for name in ("groups", "line", "plain", "hsdp")] == [member, world, 0, 0]
    assert [memory[name].line for name in ("groups", "line", "plain", "hsdp")] == [0, 2 * world, 0, 0]
    both = 2 * 440 * 4  # weights and gradients are whole under ZeRO 1
    assert {name: one.device for name, one in memory.items()} == {
        "groups": both + 4 * member,
        "line": both + 6 * world,
        "plain": both + 3 * world,
        "hsdp": both + 3 * member,
    }
    assert memory["line"].round_end == 440 * 4 + 7 * world
    # A rollback snapshot of masters, moments and average; on the line a trial's start and best end too.
    assert [memory[name].host for name in ("groups", "line", "plain", "hsdp")] == [4 * member, 3 * 4 * world, 0, 0]


def test_a_rate_and_a_decay_in_one_round_need_four_arrays():
    for population_size, arrays in ((4, 2), (5, 4)):  # a parabola for each gene needs two members
        block = {"population_size": population_size, "genes": ["lr", "weight_decay"], "members": "line"}
        assert _forms(**block)["line"].memory.line == arrays * 56 * 4
        from_centre = _forms(**block, line={"go_on_from": "centre"})["line"].memory
        assert from_centre.line == arrays // 2 * 56 * 4


def test_seconds_of_replicas_are_those_of_cooperative_steps():
    forms = _forms(strategy="control", hardware=SLOW)
    compute_s = 6 * 440 * 80 / 0.5e6  # micro-batch 2 x accumulation 4 x 10 tokens
    shared_s = 2 * 7 / 8 * 1760 / 400  # gradients over eight ranks on two nodes
    assert forms["hsdp"].seconds == pytest.approx(100 * (compute_s + shared_s + 1 / 2 * 1760 / 1000))
    assert forms["plain"].seconds == pytest.approx(100 * (compute_s + shared_s + 7 / 8 * 1792 / 400))
    assert forms["groups"].seconds > forms["hsdp"].seconds and forms["line"].seconds > forms["plain"].seconds
    assert all(form.seconds is None for form in _forms(strategy="control").values())


def test_ranks_that_do_not_divide_leave_the_line():
    forms = _forms(world_size=6, members="line")
    assert "= 4 does not divide the 6 ranks" in forms["groups"].obstacle and forms["groups"].memory is None
    assert forms["hsdp"].obstacle == "6 ranks do not divide among 4 replicas" and forms["hsdp"].memory is None
    assert forms["line"].obstacle is forms["plain"].obstacle is None


def test_a_window_that_is_too_small_for_all_ranks_leaves_groups_and_replicas():
    forms = _forms(fitness={"num_samples": 4})
    assert forms["line"].obstacle == (
        "clantune.fitness.num_samples is 4, fewer than the 8 data-parallel ranks, each of which takes at least one"
    )
    assert forms["groups"].obstacle is forms["hsdp"].obstacle is None


def test_a_strategy_that_needs_several_states_leaves_groups():
    forms = _forms(strategy="pbt")
    assert forms["line"].obstacle.startswith("the strategy 'pbt' lets members hold states of their own")
    assert forms["groups"].memory is not None
