"""Each peer's optimizer, set up as its package advises; skipped where the package is not installed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clantune_scale.bench.batched import Settings
from clantune_scale.bench.schedules.methods import FIXED
from clantune_scale.bench.schedules.peers.optimizers import OPTIMIZER_PEERS, OptimizerPeer
from clantune_scale.bench.schedules.peers.single import run_single
from clantune_scale.bench.schedules.trial import run_trial
from tests.bench.schedules.tiny_problem import TINY

PEERS = sorted(OPTIMIZER_PEERS.keys() - {"torch"})
#: Long enough for estimates of the rate that start at a millionth to have grown.
LONG = TINY.variant("long", total_steps=200)
ADAMW = Settings("adamw", lr=0.02, weight_decay=0.05, hyper={"beta1": 0.8, "beta2": 0.95, "eps": 1e-6})
SGD = Settings("sgd", lr=0.1, weight_decay=0.01, hyper={"momentum": 0.7})


def peer_of(name: str) -> OptimizerPeer:
    peer = OPTIMIZER_PEERS[name]
    pytest.importorskip(peer.module, reason="the extra 'peers' is not installed")
    return peer


def group_of(name: str, settings: Settings, problem=LONG) -> dict:
    """The parameter group that a peer is set up with."""
    setup = peer_of(name).setup([torch.ones(8, requires_grad=True)], settings, problem)
    return setup.optimizer.param_groups[0] | {"kind": type(setup.optimizer).__name__, "factor": setup.factor}


@pytest.mark.parametrize("settings", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_trains(name, settings, capsys):
    peer, problem = peer_of(name), LONG.variant("l", settings=settings)
    trial = run_trial(peer, problem, rates=[settings.lr] * 2, seeds=(0, 1))
    untrained = run_trial(FIXED, problem, rates=[0.0, 0.0], seeds=(0, 1))
    assert trial.losses[0] < 0.2 * untrained.losses[0]
    assert [run.cost for runs in trial.runs for run in runs] == [1.0] * 4
    assert trial.method == name
    assert capsys.readouterr().out == ""  # packages that print are kept from it


@pytest.mark.parametrize("name", PEERS)
def test_weight_decay_betas_and_momentum_are_the_problems(name):
    adamw, sgd = group_of(name, ADAMW), group_of(name, SGD)
    assert (adamw["weight_decay"], adamw["betas"], adamw["eps"]) == (0.05, (0.8, 0.95), 1e-6)
    assert sgd["weight_decay"] == 0.01
    assert adamw.get("decouple", True)
    if name == "prodigy":  # an Adam with betas of its own, and SGD's decay
        assert sgd["betas"] == (0.9, 0.999) and not sgd["decouple"]
    else:
        assert sgd["momentum"] == 0.7
        assert adamw["kind"].startswith(("AdamW", "DAdaptAdam")) and "SGD" in sgd["kind"]


def test_rates_are_the_starts_or_the_peers_own_as_they_advise():
    assert (group_of("schedulefree", ADAMW)["lr"], group_of("schedulefree", SGD)["lr"]) == (0.02, 0.1)
    advised = group_of("schedulefree-advised", ADAMW)["lr"], group_of("schedulefree-advised", SGD)["lr"]
    assert advised == (0.02, pytest.approx(1.0))
    for name in ("prodigy", "dadapt"):
        groups = group_of(name, ADAMW), group_of(name, SGD)
        assert [group["lr"] for group in groups] == [1.0, 1.0]
        assert groups[0]["factor"](0) == 1.0 and groups[0]["factor"](100) == pytest.approx(0.5)


def test_who_is_not_told_the_length_does_not_use_it():
    endless = LONG.variant("endless", knows_length=False)
    assert (group_of("schedulefree", SGD)["warmup_steps"], group_of("schedulefree", SGD)["factor"]) == (10, None)
    assert group_of("schedulefree", SGD, endless)["warmup_steps"] == 0
    assert group_of("prodigy", SGD, endless)["factor"] is None


def test_the_start_matters_to_schedule_free_and_not_to_those_that_estimate_the_rate():
    differ = {}
    for name in ("schedulefree", "prodigy", "dadapt"):
        losses = run_trial(peer_of(name), LONG, rates=[0.01, 0.3], seeds=(0,)).losses
        differ[name] = losses[0] != losses[1]
    assert differ == {"schedulefree": True, "prodigy": False, "dadapt": False}


def test_no_momentum_is_the_packages_own_with_schedule_free():
    assert group_of("schedulefree", replace(SGD, hyper={"momentum": 0.0}))["momentum"] == 0.9


def test_schedule_free_is_evaluated_in_eval_mode():
    """Its test loss is the average's, which a run by hand computes from the definition."""
    package = pytest.importorskip("schedulefree", reason="the extra 'peers' is not installed")
    theta = torch.ones(8, requires_grad=True)
    reference = package.SGDScheduleFreeReference([theta], lr=0.1, momentum=0.7, weight_decay=0.01, warmup_steps=10)
    reference.train()
    for step in range(200):
        batch = [column.unsqueeze(0) for column in LONG.batch(4, step, 0)]
        theta.grad = torch.autograd.grad(LONG.losses([theta.unsqueeze(0)], batch, {}).mean(), theta)[0]
        reference.step()

    def loss() -> float:
        return float(LONG.losses([theta.detach().unsqueeze(0)], [LONG.test[0].unsqueeze(0)], {}).mean())

    in_training = loss()
    reference.eval()
    ours = run_single(peer_of("schedulefree"), LONG, SGD, 4)
    assert ours.loss == pytest.approx(loss(), rel=1e-3)  # two float32 implementations, 200 steps apart
    assert ours.loss != pytest.approx(in_training, rel=1e-2)
    assert ours.rates[0][1] == pytest.approx(0.01) and ours.rates[-1][1] == pytest.approx(0.1)
