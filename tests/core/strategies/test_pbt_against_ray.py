"""Decisions of ``pbt`` against Ray Tune's own scheduler, on recorded scores and the same draws."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from clantune_scale.core import mutation
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.strategies import Population, build
from tests.core.strategies.facts import facts, fitness_of

tune_pbt = pytest.importorskip("ray.tune.schedulers.pbt", reason="the extra 'peers' is not installed")

SEED, SIZE = 7, 10
LR = Gene("lr", bounds=(1e-6, 1e6), relative=True)
WEIGHT_DECAY = Gene("weight_decay", scale="linear", bounds=(0.0, 1e6))
GENES = (LR, WEIGHT_DECAY)


class Draws:
    """Stands in for Ray's ``random`` module: hands out our draws, in the order in which Ray asks."""

    def __init__(self) -> None:
        self.queue: list[float] = []

    def random(self) -> float:
        return self.queue.pop(0)

    def choice(self, options):
        return options[int(self.queue.pop(0) * len(options))]


class Recorded(tune_pbt.PopulationBasedTraining):
    """Ray's scheduler, which notes what it would have a trial exploit instead of starting it."""

    def _exploit(self, controller, trial, trial_to_clone):
        # The trial's own config stays as it is: trials decide in turn here, and at once in a clan.
        config, _ = self._get_new_config(trial, trial_to_clone)
        self.decided[trial.index] = (trial_to_clone.index, config)


def ray_decides(scores, configs, quantile, resample_probability, monkeypatch):
    """By member: (whom it clones, its new config) for those that Ray has exploit."""
    draws = Draws()
    monkeypatch.setattr(tune_pbt, "random", draws)
    over = {gene.name: lambda gene=gene: _resampled(gene, draws.queue.pop(0)) for gene in GENES}
    scheduler = Recorded(
        metric="score",
        mode="max",
        hyperparam_mutations=over,
        quantile_fraction=quantile,
        resample_probability=resample_probability,
    )
    scheduler.decided = {}
    trials = [
        SimpleNamespace(index=i, config=config, status="RUNNING", is_finished=lambda: False, trial_id=str(i))
        for i, config in enumerate(configs)
    ]
    scheduler._trial_state = _ByIdentity(
        (trial, SimpleNamespace(last_score=score, last_result=None, last_checkpoint=None))
        for trial, score in zip(trials, scores, strict=True)
    )
    controller = SimpleNamespace(_schedule_trial_save=lambda trial, result: "saved")
    lower, upper = scheduler._quantiles()
    for trial in [*upper, *(t for t in trials if t not in upper)]:
        draws.queue = _draws_of(trial.index)
        # Ray lists the fittest last; equal draws mean equal members only in one order.
        scheduler._checkpoint_or_exploit(trial, controller, upper[::-1], lower)
    return scheduler.decided


class _ByIdentity(dict):
    """A mapping with keys that have no hash of their own."""

    def __init__(self, pairs) -> None:
        super().__init__()
        self._pairs = list(pairs)

    def __getitem__(self, wanted):
        return next(value for key, value in self._pairs if key is wanted)

    def items(self):
        return self._pairs


def _draws_of(member: int, round_: int = 3) -> list[float]:
    """What ``pbt`` draws for a member, in Ray's order: whom to clone, then two numbers per gene."""
    drawn = [mutation.uniform(SEED, round_, member, "exploit")]
    for gene in GENES:
        drawn += mutation.uniforms(SEED, round_, member, f"explore:{gene.name}", count=2).tolist()
    return drawn


def _resampled(gene: Gene, draw: float) -> float:
    low, high = (gene.encode(bound) for bound in gene.bounds)
    return gene.decode(low + draw * (high - low))


@pytest.mark.parametrize("resample_probability", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("quantile", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("case", range(5))
def test_equal_scores_and_draws_make_equal_decisions(case, quantile, resample_probability, monkeypatch):
    rng = np.random.default_rng(case)
    losses = rng.permutation(SIZE) + rng.random(SIZE)
    configs = [{"lr": float(lr), "weight_decay": float(wd)} for lr, wd in 0.1 + rng.random((SIZE, 2))]
    theirs = ray_decides((-losses).tolist(), configs, quantile, resample_probability, monkeypatch)

    run = facts(population_size=SIZE, seed=SEED, genes=GENES)
    pbt = build("pbt", run, {"quantile": quantile, "resample_probability": resample_probability})
    population = Population(tuple(Genome(config, {}) for config in configs))
    decision = pbt.evolve(population, pbt.plan(3, 60), fitness_of(losses))
    ours = {m: d for m, d in enumerate(decision.donors) if d != m}
    assert ours == {member: donor for member, (donor, _) in theirs.items()}
    assert len(ours) >= 1
    for member, (_, config) in theirs.items():
        assert dict(decision.population.genomes[member].values) == pytest.approx(config, rel=1e-12)


def test_the_defaults_are_rays(monkeypatch):
    theirs = tune_pbt.PopulationBasedTraining(metric="score", mode="max", hyperparam_mutations={"lr": [1.0]})
    ours = build("pbt", facts()).options
    assert ours.quantile == theirs._quantile_fraction
    assert ours.resample_probability == theirs._resample_probability
    assert ours.factors == tuple(theirs._perturbation_factors)
