"""fp16: members' loss scales drift apart while they compete, and must be one while gradients are averaged.

DeepSpeed refuses fp16 on a processor without native half-precision products. Torch computes them all the same,
by way of float32, in everything that ZeRO 1, 2 and 3 do; the ranks below therefore tell DeepSpeed that they may.
"""

from __future__ import annotations

import pytest
import torch

from clantune_scale.backends.deepspeed import DeepSpeedBackend
from clantune_scale.errors import ConfigError
from tests.backends.small_runs import SGD, ds_config, flat_weights, in_member_worlds, plain_engine
from tests.ranks import run_ranks
from tests.small_clans import clan_config, flat_run, start, train

SCALE_POWER = 12


def fp16_config(stage: int, *, lr: float = 0.1, **options) -> dict:
    optimizer = {"type": "SGD", "params": SGD["params"] | {"lr": lr}}
    config = ds_config(stage, optimizer=optimizer, **options)
    scaling = {"enabled": True, "initial_scale_power": SCALE_POWER, "hysteresis": 1, "loss_scale_window": 1000}
    return config | {"fp16": scaling}


def _with_fp16(rank, function, *args):
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return function(rank, *args)


def run_fp16_ranks(world_size, function, *args):
    return run_ranks(world_size, in_member_worlds, _with_fp16, function, *args)


def one_step(engine, loader, *, factor: float = 1.0) -> None:
    """An optimizer step whose loss is multiplied by ``factor``."""
    for inputs in loader:
        engine.backward(engine(*inputs) * factor)
        engine.step()
        return


def _flat(rank, config):
    return flat_run(config, 6)[0]


def _cooperate(rank, config):
    engine, loader = start(config)
    train(engine, loader, 6)
    return flat_weights(engine), engine.module.first.weight.dtype, engine.skipped_steps


STAGES = [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_cooperative_clan_equals_flat_data_parallelism(stage, tmp_path):
    config = fp16_config(stage, accumulation=2, clip=0.5)
    expected = run_fp16_ranks(4, _flat, config)[0]
    block = clan_config(tmp_path, config, strategy="control", total_steps=12)
    results = run_fp16_ranks(4, _cooperate, block)
    for weights, dtype, skipped in results:
        assert dtype is torch.float16 and skipped == 0
        # Half precision has 11 bits: two orders of summation differ by 5e-4 of a gradient, and six clipped steps
        # of 0.1 move a weight by up to 0.3.
        assert (weights - expected).abs().max() < 3e-4
        assert torch.equal(weights, results[0][0])


def _overflow_while_competing(rank, config, odd_member):
    engine, loader = start(config)
    clan = engine.clan
    scales = []
    for step in range(7):
        is_odd = step == 3 and clan.member == odd_member
        one_step(engine, loader, factor=float("inf") if is_odd else 1.0)
        scales.append((clan.phases.position.phase.kind.value, clan.backend.loss_scale()["cur_scale"]))
    return clan.member, scales, engine.skipped_steps, clan.progress.lineage


@pytest.mark.parametrize("stage, odd_member", [(1, 0), (2, 1), (3, 1)])
def test_the_smallest_scale_becomes_the_clans_when_it_cooperates_again(stage, odd_member, tmp_path):
    # At a learning rate of 0 all members stay equally fit, so that nobody is cloned and scales move by agreement alone.
    strategy = {"name": "control", "options": {"competes": True}}
    block = clan_config(tmp_path, fp16_config(stage, lr=0.0), strategy=strategy, duty_cycle=0.4)
    high, low = 2.0**SCALE_POWER, 2.0 ** (SCALE_POWER - 1)
    for member, scales, skipped, lineage in run_fp16_ranks(2, _overflow_while_competing, block, odd_member):
        own = low if member == odd_member else high
        expected = [("cooperative", high)] * 2 + [("competitive", high), ("competitive", own)]
        assert scales == expected + [("cooperative", low)] * 3
        assert skipped == (member == odd_member)
        assert all(record.donors == (0, 1) for record in lineage)


def _overflow_while_cooperating(rank, config):
    engine, loader = start(config)
    one_step(engine, loader)
    before = flat_weights(engine)
    one_step(engine, loader, factor=float("inf") if rank == 3 else 1.0)
    after, skipped, scale = flat_weights(engine), engine.skipped_steps, engine.clan.backend.loss_scale()
    position = engine.clan.phases.position.step
    one_step(engine, loader)
    return before, after, skipped, scale, position, flat_weights(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_on_one_rank_skips_the_step_of_every_member(stage, tmp_path):
    block = clan_config(tmp_path, fp16_config(stage, clip=0.5), strategy="control")
    results = run_fp16_ranks(4, _overflow_while_cooperating, block)
    for before, after, skipped, scale, position, continued in results:
        assert torch.equal(before, after) and skipped == 1
        # A step that was skipped is a step of the round none the less, on every member.
        assert position == 2
        assert scale == results[0][3] and scale["cur_scale"] == 2.0 ** (SCALE_POWER - 1)
        assert torch.equal(continued, results[0][5]) and not torch.equal(continued, after)


def _stage_0(rank, config):
    try:
        DeepSpeedBackend(plain_engine(config))
    except ConfigError as error:
        return str(error)


def test_stage_0_is_refused():
    (said,) = run_fp16_ranks(1, _stage_0, fp16_config(0))
    assert said.startswith("fp16 with ZeRO stage 0 does not scale its loss in DeepSpeed 0.19")
