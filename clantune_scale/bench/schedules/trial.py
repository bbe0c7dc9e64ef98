"""One method on one problem: all starts and seeds as one batch of clans."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from clantune_scale.bench.batched import BatchedClan, BatchedClans, Settings
from clantune_scale.bench.batched.expression import rate_factor
from clantune_scale.bench.schedules import curves
from clantune_scale.bench.schedules.methods import Method
from clantune_scale.bench.schedules.peers.optimizers import OptimizerPeer
from clantune_scale.bench.schedules.peers.single import run_single
from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.core.fitness import Fitness

#: Cost of a sample's loss without its gradient, as a share of the gradient's: the backward pass is twice the forward.
FORWARD_SHARE = 1 / 3
#: Largest share of a run's training samples that a validation window holds. More would make evaluations of a short
#: run cost more than its training. The user chooses the window, and a careful user would choose so.
WINDOW_SHARE = 1 / 240
#: Smallest window: an example for each of the batches that noise is measured over.
FEWEST_EXAMPLES = 16


@dataclass(frozen=True)
class TrialRun:
    """How one run went.

    Attributes:
        loss: of its champion on the test data; infinite if that is not a number.
        cost: gradient evaluations of training and of evaluations that decide, in plain runs of equal length.
        rates: (step, learning rate), the members' geometric mean.
        rollbacks: rounds that the guard rolled back.
        validation: (step, the fittest member's loss on the window) at the ends of rounds that were not rolled back,
            and of the run; empty if nothing is evaluated on the way.
    """

    loss: float
    cost: float
    rates: tuple[tuple[int, float], ...]
    rollbacks: int
    validation: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Trial:
    """A method's runs on a problem.

    Attributes:
        runs: [starts][seeds].
        cpu_s: processor seconds of one run.
    """

    method: str
    problem: str
    runs: tuple[tuple[TrialRun, ...], ...]
    cpu_s: float

    @property
    def losses(self) -> list[float]:
        """[starts]: mean test loss over seeds."""
        return [statistics.fmean(run.loss for run in runs) for runs in self.runs]


def run_trial(
    method: Method | OptimizerPeer, problem: Problem, *, rates: Sequence[float], seeds: Sequence[int]
) -> Trial:
    """Runs ``method`` from every start of ``problem``, with every seed.

    Args:
        method: the row.
        problem: the columns.
        rates: [starts], the learning rate of each.
        seeds: of weights, data and decisions.
    """
    own = None if isinstance(method, OptimizerPeer) else method.schedule
    configured = [
        replace(
            problem.settings,
            lr=rate,
            schedule=curves.over(own or start.schedule or problem.schedule, problem.total_steps),
            **start.changes,
        )
        for start, rate in zip(problem.starts, rates, strict=True)
    ]
    settings = [own for own in configured for _ in seeds]
    runs_per_seed = list(seeds) * len(configured)
    began = time.process_time()
    if isinstance(method, OptimizerPeer):
        runs = _single_runs(method, problem, settings, runs_per_seed)
    else:
        runs = _clan_runs(method, problem, settings, runs_per_seed)
    cpu_s = (time.process_time() - began) / len(runs)
    by_start = tuple(tuple(runs[i : i + len(seeds)]) for i in range(0, len(runs), len(seeds)))
    return Trial(method.name, problem.name, by_start, cpu_s)


def _clan_runs(method: Method, problem: Problem, settings: Sequence[Settings], seeds: Sequence[int]) -> list[TrialRun]:
    """[runs]; all clans with the same genes at once, because their rounds explore the same."""
    names = [method.gene_names(problem, own) for own in settings]
    runs: dict[int, TrialRun] = {}
    for chosen in dict.fromkeys(names):
        rows = [row for row, own in enumerate(names) if own == chosen]
        batch = _batch_of_runs(method, problem, [settings[row] for row in rows], [seeds[row] for row in rows])
        runs |= zip(rows, batch, strict=True)
    return [runs[row] for row in range(len(names))]


def _batch_of_runs(
    method: Method, problem: Problem, settings: Sequence[Settings], seeds: Sequence[int]
) -> list[TrialRun]:
    """[runs], all clans at once."""
    clans = BatchedClans(
        problem.variant(problem.name, validation=window(problem)),
        strategies=[method.build(problem, own, seed) for own, seed in zip(settings, seeds, strict=True)],
        settings=settings,
        seeds=seeds,
        members=method.members,
        average_every=method.average_every,
    )
    clans.run(problem.total_steps)
    return [
        TrialRun(
            loss,
            _cost(clan.num_trained, clan.num_evaluated, problem),
            _rates(clan),
            sum(record.restored for record in clan.lineage),
            _validation(clan, end, problem.total_steps),
        )
        for clan, loss, end in zip(
            clans.clans, champion_losses(clans, problem), clans.evaluate(averaged=_averages(clans)), strict=True
        )
    ]


def window(problem: Problem) -> list[torch.Tensor]:
    """The validation examples that decisions are made on, tensors [examples, ...]: all if the run is long enough."""
    affordable = int(WINDOW_SHARE * problem.total_steps * problem.batch_size)
    return [column[: max(FEWEST_EXAMPLES, affordable)] for column in problem.validation]


def _single_runs(
    peer: OptimizerPeer, problem: Problem, settings: Sequence[Settings], seeds: Sequence[int]
) -> list[TrialRun]:
    """[runs], one after another; nothing is evaluated on the way."""
    singles = [run_single(peer, problem, own, seed) for own, seed in zip(settings, seeds, strict=True)]
    return [TrialRun(single.loss, _cost(single.num_trained, 0, problem), single.rates, 0) for single in singles]


def champion_losses(clans: BatchedClans, problem: Problem) -> list[float]:
    """[clans]: the test loss of the member, and of its weights or their average, that validation prefers.

    Averages count if the last round kept them up to date, as in a real run.
    """
    roles = (False, True) if _averages(clans) else (False,)
    validation = torch.cat([clans.losses_on(problem.validation, averaged=role).mean(dim=-1) for role in roles], dim=1)
    test = torch.cat([clans.losses_on(problem.test, averaged=role).mean(dim=-1) for role in roles], dim=1)
    champions = validation.nan_to_num(math.inf, math.inf).argmin(dim=1, keepdim=True)
    return test.gather(1, champions).squeeze(1).nan_to_num(math.inf, math.inf).tolist()


def _averages(clans: BatchedClans) -> bool:
    """Whether the last round kept averages of the weights up to date."""
    return clans.clans[0].clock.at(max(clans.num_steps - 1, 0)).plan.uses_ema


def _validation(clan: BatchedClan, end: Fitness, total_steps: int) -> tuple[tuple[int, float], ...]:
    """At the ends of rounds that were not rolled back, and at the run's end, where a round may not be over."""
    points = []
    for record in clan.lineage:
        losses = [loss for loss in record.losses if loss is not None]
        if losses and not record.restored:
            points.append((record.end_step, min(losses)))
    last = float(end.mean.min())
    if math.isfinite(last) and not (points and points[-1][0] == total_steps):
        points.append((total_steps, last))
    return tuple(points)


def _cost(num_trained: int, num_evaluated: int, problem: Problem) -> float:
    work = num_trained + FORWARD_SHARE * num_evaluated
    return work / (problem.total_steps * problem.batch_size)


def _rates(clan: BatchedClan) -> tuple[tuple[int, float], ...]:
    """At each round's first and last step."""
    gene = next((gene for gene in clan.strategy.facts.genes if gene.target == "lr"), None)
    points = []
    for record in clan.lineage:
        own = [genome.values[gene.name] for genome in record.genomes] if gene else [1.0]
        factor = statistics.geometric_mean(own)
        for step in (record.start_step, record.end_step - 1):
            scheduled = clan.settings.lr * rate_factor(clan.settings, clan.strategy, step)
            points.append((step, factor * scheduled))
    return tuple(points)
