"""The trainer of single runs, by torch's own optimizers: no peer's package is needed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from clantune_scale.bench.batched import Settings
from clantune_scale.bench.schedules.methods import FIXED
from clantune_scale.bench.schedules.peers.optimizers import OPTIMIZER_PEERS, OptimizerPeer, Setup
from clantune_scale.bench.schedules.peers.single import run_single
from clantune_scale.bench.schedules.problem import Start
from clantune_scale.bench.schedules.problems.regression import Regression
from clantune_scale.bench.schedules.trial import run_trial
from clantune_scale.errors import ConfigError
from tests.bench.schedules.tiny_problem import TINY, Tiny

TORCH = OPTIMIZER_PEERS["torch"]


class Knobbed(Tiny):
    """Its loss depends on a knob in training, and on none in evaluation."""

    name = "knobbed"
    settings = Settings("sgd", hyper={"momentum": 0.5}, knobs={"scale": 0.3})

    def losses(self, parameters, batch, knobs):
        losses = super().losses(parameters, batch, knobs)
        return losses * knobs["scale"].view(-1, 1) if "scale" in knobs else losses


ADAMW = Settings("adamw", weight_decay=0.1, hyper={"beta1": 0.8, "beta2": 0.9, "eps": 1e-4})
CASES = {
    "sgd": TINY,
    "momentum, decay, clip": TINY.variant("m", settings=Settings("sgd", weight_decay=0.02, clip=0.3)),
    "adamw": TINY.variant("a", settings=ADAMW),
    "schedule": TINY.variant("s", settings=ADAMW, schedule="warmup-cosine"),
    "two micro-batches": TINY.variant("b", starts=(Start("2", 1.0, {"num_micro_batches": 2}),) * 2),
    "knob": Knobbed(),
    "network": Regression("adamw").variant("n", total_steps=60, starts=TINY.starts),
}


@pytest.mark.parametrize("problem", CASES.values(), ids=CASES.keys())
def test_torchs_own_optimizer_is_fixed(problem):
    """So that peers have the data, the losses, the steps and the split of everything else."""
    rates = [0.003, 0.01] if problem is CASES["network"] else [0.01, 0.3]  # where it is not chaotic
    theirs = run_trial(TORCH, problem, rates=rates, seeds=(0, 3))
    ours = run_trial(FIXED, problem, rates=rates, seeds=(0, 3))
    for losses, expected in zip(theirs.losses, ours.losses, strict=True):
        assert losses == pytest.approx(expected, rel=2e-4)  # float32, summed in another order, through 40 or 60 steps
    assert theirs.losses[0] != theirs.losses[1] or problem is CASES["two micro-batches"]
    costs = [[run.cost for run in runs] for runs in theirs.runs]
    assert costs == [[run.cost for run in runs] for runs in ours.runs]
    assert costs[0][0] == (2.0 if problem is CASES["two micro-batches"] else 1.0)


def test_rates_are_noted_as_they_were():
    run = run_trial(TORCH, TINY.variant("s", schedule="linear"), rates=[0.1, 0.2], seeds=(0,)).runs[1][0]
    assert run.rates == tuple((step, pytest.approx(0.2 * (1 - step / 40))) for step in range(40))


def test_a_run_that_diverges_has_an_infinite_loss():
    assert run_trial(TORCH, TINY, rates=[0.1, 1e6], seeds=(0,)).losses[1] == math.inf


def test_weights_are_those_of_evaluation():
    def doubled(parameters, settings, problem):
        plain = TORCH.setup(parameters, settings, problem)

        def evaluates():
            with torch.no_grad():
                parameters[0].mul_(2)

        return Setup(plain.optimizer, plain.factor, evaluates)

    settings = replace(TINY.settings, lr=0.3)
    plain, twice = (run_single(peer, TINY, settings, 0) for peer in (TORCH, OptimizerPeer("2", "torch", doubled)))
    assert twice.loss == pytest.approx(4 * plain.loss)  # the test loss is quadratic in the weights
    assert plain.num_trained == 40 * 8


def test_an_optimizer_that_a_peer_has_no_form_of_is_refused():
    problem = TINY.variant("lion", settings=replace(TINY.settings, optimizer="lion", hyper={}))
    with pytest.raises(ConfigError, match="'torch' has no form of the optimizer 'lion'"):
        run_trial(TORCH, problem, rates=[0.1, 0.2], seeds=(0,))
