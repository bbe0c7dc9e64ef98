"""A round's figures: alignment, drift, norms, strikes, stragglers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clantune_scale.runtime.diagnostics import Diagnostics
from clantune_scale.tracking import read_events
from tests.backends.small_runs import ds_config, in_member_worlds
from tests.ranks import run_ranks
from tests.small_clans import clan_config, start, train


def _flat(parameters):
    return torch.cat([parameter.flatten().clone() for parameter in parameters])


def _record_by_hand(rank, config, num_steps):
    """Gradients and weights as they are on this rank, beside what the clan reports."""
    engine, loader = start(config)
    own, mean, weights = [], [], []
    reduce, take_step = engine.allreduce_gradients, engine._take_model_step

    def record_own(*args, **kwargs):
        own.append(_flat(p.grad for p in engine.module.parameters()))
        return reduce(*args, **kwargs)

    def record_mean(*args, **kwargs):
        mean.append(_flat(p.grad for p in engine.module.parameters()))
        result = take_step(*args, **kwargs)
        weights.append(_flat(p.detach() for p in engine.module.parameters()))
        return result

    engine.allreduce_gradients, engine._take_model_step = record_own, record_mean
    train(engine, loader, num_steps)
    return own, mean, weights, str(engine.clan.recorder.run_dir)


def _rounds(run_dir):
    return [event for event in read_events(f"{run_dir}/events.jsonl") if event["kind"] == "round_end"]


def test_alignment_drift_and_norm_are_what_they_are_by_hand(tmp_path):
    # Rounds of one step: each step is the last of its phase and is looked at.
    genes = {"lr": {"step_size": 0.5}}
    config = clan_config(tmp_path, ds_config(0, clip=0.5), population_size=4, round_length=1, genes=genes)
    results = run_ranks(4, in_member_worlds, _record_by_hand, config, 3)
    for step, event in enumerate(_rounds(results[0][3])):
        centre = torch.stack([weights[step] for _, _, weights, _ in results]).double().mean(0)
        for member, (own, mean, weights, _) in zip(event["members"], results, strict=True):
            cosine = torch.nn.functional.cosine_similarity(own[step], mean[step], dim=0)
            drift = (weights[step] - centre).norm() / centre.norm()
            # Inner products of 1,200 float32 terms, summed in another order.
            assert member["alignment"] == pytest.approx(float(cosine), abs=1e-5)
            assert member["gradient_norm"] == pytest.approx(float(mean[step].norm()), rel=1e-5)
            assert member["drift"] == pytest.approx(float(drift), rel=1e-3)
            assert 0 < member["alignment"] < 1 and member["drift"] > 0 and member["strikes"] == 0


def _train(rank, config, num_steps):
    engine, loader = start(config)
    train(engine, loader, num_steps)
    return str(engine.clan.recorder.run_dir)


def _losses(rank, config, num_steps):
    engine, loader = start(config)
    losses = train(engine, loader, num_steps)
    return losses, engine.clan.fitness.training_loss, str(engine.clan.recorder.run_dir)


def test_a_members_training_loss_is_the_mean_over_its_ranks_and_the_rounds_micro_batches(tmp_path):
    config = clan_config(tmp_path, ds_config(1, accumulation=2), round_length=4)
    results = run_ranks(4, in_member_worlds, _losses, config, 8)
    second = _rounds(results[0][2])[1]
    own = [np.mean([losses[len(losses) // 2 :] for losses, *_ in results[i : i + 2]]) for i in (0, 2)]
    assert [member["training_loss"] for member in second["members"]] == pytest.approx(own)
    assert own[0] != own[1]
    assert [clan for _, clan, _ in results] == [pytest.approx(np.mean(own))] * 4


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_sharded_gradients_give_the_figures_of_whole_ones(stage, tmp_path):
    def diagnostics(stage, name):
        config = clan_config(tmp_path / name, ds_config(stage, clip=0.5), genes={"lr": {"step_size": 0.5}})
        return _rounds(run_ranks(4, in_member_worlds, _train, config, 5)[0])[0]["members"]

    for whole, sharded in zip(diagnostics(0, "whole"), diagnostics(stage, "sharded"), strict=True):
        for name in ("alignment", "drift", "gradient_norm"):
            # AdamW turns the last bit of a gradient into 1e-6 of a weight; drift is a difference of such weights.
            assert sharded[name] == pytest.approx(whole[name], rel=1e-3)


def test_a_straggler_is_named_from_half_as_long_again():
    def straggler(*seconds):
        nothing = np.zeros(len(seconds))
        return Diagnostics(*[nothing] * 5, evaluation_s=np.array(seconds), training_loss=nothing).straggler

    assert straggler(1.0, 1.1, 1.6, 1.0) == {"member": 2, "seconds": 1.6, "median_s": pytest.approx(1.05)}
    assert straggler(1.0, 1.1, 1.4, 1.0) is None
    assert straggler(1.0, 9.0) is None


def test_what_a_member_does_not_have_is_none():
    missing = np.array([math.nan, 2.0])
    diagnostics = Diagnostics(
        *[missing] * 4,
        nonfinite_counts=np.array([0.0, 3.0]),
        evaluation_s=np.ones(2),
        training_loss=np.array([1.0, math.nan]),
    )
    nothing = {"gradient_norm": None, "drift": None, "alignment": None}
    assert diagnostics.of(0) == {**nothing, "training_loss": 1.0, "strikes": 0}
    assert diagnostics.of(1) == {**dict.fromkeys(nothing, 2.0), "training_loss": None, "strikes": 3}
    assert diagnostics.clan_training_loss is None
