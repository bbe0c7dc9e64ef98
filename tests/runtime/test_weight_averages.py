"""Averaged weights: the window's formula, and a swap that leaves no trace, on plain tensors and under ZeRO."""

from __future__ import annotations

import pytest
import torch

from clantune_scale.runtime.weight_averages import WeightEma
from tests.backends.small_runs import batch, ds_config, flat_weights, in_member_worlds, member_engine, train_step
from tests.ranks import run_ranks


def masters_of(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]


def walk(masters: list[torch.Tensor], step: int) -> None:
    for master, change in zip(masters, masters_of(100 + step), strict=True):
        master += change


@pytest.mark.parametrize("window", [1, 4, 1000])
def test_the_average_follows_its_formula(window):
    masters = masters_of(0)
    uses_ema = WeightEma(lambda: masters, lambda: None)
    expected = [master.double() for master in masters]
    for step in range(1, 13):
        walk(masters, step)
        uses_ema.update(step, window)
        # The window grows with the run, as 0.9 of its steps, and is never shorter than one.
        weight = 1.0 / max(1.0, min(0.9 * step, window))
        expected = [(1 - weight) * e + weight * master.double() for e, master in zip(expected, masters, strict=True)]
        for average, e in zip(uses_ema.tensors, expected, strict=True):
            # Twelve float32 roundings of numbers up to 10.
            assert (average.double() - e).abs().max() < 1e-5
    if window == 1:
        assert all(torch.equal(a, master) for a, master in zip(uses_ema.tensors, masters, strict=True))
    else:
        assert (uses_ema.tensors[0] - masters[0]).abs().max() > 0.1


def test_restart_takes_the_present_weights_as_copies():
    masters = masters_of(0)
    uses_ema = WeightEma(lambda: masters, lambda: None)
    walk(masters, 1)
    uses_ema.restart()
    assert all(torch.equal(average, master) for average, master in zip(uses_ema.tensors, masters, strict=True))
    walk(masters, 2)
    assert not torch.equal(uses_ema.tensors[0], masters[0])


def test_the_swap_is_exact_and_refreshes_both_times():
    masters = masters_of(0)
    refreshed = []
    uses_ema = WeightEma(lambda: masters, lambda: refreshed.append(masters[0].clone()))
    walk(masters, 1)
    # What arithmetic would lose: a sum and difference of these does not come back.
    masters[0][0] = torch.tensor([1e30, 1e-30, float("nan")])
    own, average = [m.clone() for m in masters], [t.clone() for t in uses_ema.tensors]
    with pytest.raises(ZeroDivisionError), uses_ema.in_place_of_weights():
        assert all(torch.equal(m, a) for m, a in zip(masters, average, strict=True))
        raise ZeroDivisionError
    for tensors, kept in ((masters, own), (uses_ema.tensors, average)):
        assert all(torch.equal(t.nan_to_num(7.0), k.nan_to_num(7.0)) for t, k in zip(tensors, kept, strict=True))
    assert len(refreshed) == 2 and torch.equal(refreshed[0], average[0])


def _swap_in_engine(rank, config):
    _, backend = member_engine(config, 1)
    engine = backend.engine

    def look():
        with backend.evaluating():
            loss = engine(*batch(99, 0, 0)).item()
        return loss, flat_weights(engine), {k: v.clone() for k, v in (backend.full_weights() or {}).items()}

    uses_ema = WeightEma(backend.masters, backend.refresh)
    before = look()
    for step in range(3):
        train_step(engine, step, rank)
    trained = look()
    with uses_ema.in_place_of_weights():
        inside = look()
    after = look()
    train_step(engine, 3, rank)
    continued = flat_weights(engine)
    return before, trained, inside, after, continued


def _train_without_swap(rank, config):
    _, backend = member_engine(config, 1)
    for step in range(4):
        train_step(backend.engine, step, rank)
    return flat_weights(backend.engine)


@pytest.mark.parametrize("stage, dtype", [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_under_zero_the_model_computes_with_the_average_and_then_with_its_own_weights_again(stage, dtype):
    config = ds_config(stage, dtype=dtype, clip=0.5)
    if stage == 3:
        # By default ZeRO 3 keeps parameters this small whole; so weights are partitioned and biases are not.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    undisturbed = run_ranks(2, in_member_worlds, _train_without_swap, config)
    for rank, looks in enumerate(run_ranks(2, in_member_worlds, _swap_in_engine, config)):
        before, trained, inside, after, continued = looks
        # The average was never updated: it is where training began.
        for (loss, masters, weights), (same_loss, same_masters, same_weights) in ((inside, before), (after, trained)):
            assert loss == same_loss and torch.equal(masters, same_masters)
            assert weights.keys() == same_weights.keys()
            assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
        assert inside[0] != after[0]
        assert torch.equal(continued, undisturbed[rank])
