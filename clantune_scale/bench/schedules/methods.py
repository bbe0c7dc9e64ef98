"""The rows of the table: a strategy with its options and its clan, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from clantune_scale.bench.batched import Settings
from clantune_scale.bench.schedules.peers.extra import imported
from clantune_scale.bench.schedules.peers.optimizers import OPTIMIZER_PEERS, OptimizerPeer
from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.config.gene_catalogue import CATALOGUE
from clantune_scale.core.genome import Gene
from clantune_scale.core.spelling import did_you_mean
from clantune_scale.core.strategies import STRATEGIES, build
from clantune_scale.core.strategies.base import RunFacts, Strategy
from clantune_scale.errors import ConfigError

#: A name that stands for a learning rate of each parameter group.
EVERY_GROUP = "lr:*"
#: Rounds of the user's length in a run.
ROUNDS_PER_RUN = 60


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: of the row.
        strategy: as in a config.
        options: the strategy's.
        population_size: members that share the problem's batch.
        round_length_steps: the user's round length; None for a sixtieth of the run.
        duty_cycle: the user's.
        schedule: name of a learning-rate curve in place of the start's own; None keeps that.
        genes: in place of the default ones and the problem's; ``"lr:*"`` stands for a learning rate of each group.
        average_every: steps from one update of averaged weights to the next.
        genes_like: the strategy whose default genes it has; None for its own. A variant of ``clan`` by another name
            would have other ones.
        members: ``"groups"`` trains all members; ``"line"`` computes them from one model in rounds that allow it.
    """

    name: str
    strategy: str
    options: Mapping[str, object] = field(default_factory=dict)
    population_size: int = 8
    round_length_steps: int | None = None
    duty_cycle: float = 0.1
    schedule: str | None = None
    genes: Sequence[str] | None = None
    genes_like: str | None = None
    members: Literal["groups", "line"] = "groups"
    average_every: int = 1

    def gene_names(self, problem: Problem, settings: Settings) -> tuple[str, ...]:
        """Names of the genes of a run that is configured with ``settings``."""
        like = self.genes_like or self.strategy
        if self.genes is None:
            return problem.genes_of(like, settings)
        groups = dict.fromkeys(problem.group_of)
        every = [f"lr:{group}" for group in groups]
        expanded = (every if name == EVERY_GROUP else [name] for name in self.genes)
        return tuple(name for names in expanded for name in names)

    def build(self, problem: Problem, settings: Settings, seed: int) -> Strategy:
        """The strategy of one run that is configured with ``settings``."""
        genes = tuple(_started(_gene(name), settings) for name in self.gene_names(problem, settings))
        facts = RunFacts(
            population_size=self.population_size,
            genes=genes,
            seed=seed,
            round_length_steps=self.round_length_steps or max(1, problem.total_steps // ROUNDS_PER_RUN),
            duty_cycle=self.duty_cycle,
            total_steps=problem.total_steps if problem.knows_length else None,
            sees_samples_once=problem.sees_samples_once,
        )
        strategy = build(self.strategy, facts, self.options)
        if hasattr(strategy, "schedule"):  # one that asks for it; no engine tells it yet
            strategy.schedule = settings.schedule
        return strategy


#: A run as its start configures it: one member, one round, no genes (a clip gene would write a clip).
FIXED = Method("fixed", "control", population_size=1, round_length_steps=1_000_000, genes=())
WARMUP_LINEAR = replace(FIXED, name="warmup-linear", schedule="warmup-linear")
WARMUP_COSINE = replace(FIXED, name="warmup-cosine", schedule="warmup-cosine")
BASELINES = {method.name: method for method in (FIXED, WARMUP_LINEAR, WARMUP_COSINE)}

_RAY_TUNE = "clantune_scale.bench.schedules.peers.ray_tune"
#: Peers that decide over a population. Its members share out the problem's batch, so that all together compute as many
#: gradients as the plain run; or each takes the whole batch, as published, which costs a plain run per member. PB2's
#: process takes a third of a second a decision, and far more from 200 results on: its rounds are three of the others'.
POPULATION_PEERS = {
    "ray-pbt": Method("ray-pbt", f"{_RAY_TUNE}:RayPBT"),
    "ray-pb2": Method("ray-pb2", f"{_RAY_TUNE}:RayPB2", {"stretch": 3}),
    "ray-pbt-full": Method("ray-pbt-full", f"{_RAY_TUNE}:RayPBT", {"full_batch": True}),
    "ray-pb2-full": Method("ray-pb2-full", f"{_RAY_TUNE}:RayPB2", {"full_batch": True, "stretch": 3}),
}


#: A strategy's name with this ending is the row with its members on the line.
LINE = "-line"


def named(
    names: Sequence[str], population_size: int, *, members: Literal["groups", "line"] = "groups"
) -> list[Method | OptimizerPeer]:
    """The baselines, peers and strategies of these names.

    Args:
        names: a strategy's with ``-line`` at its end is that strategy with its members on the line.
        population_size: of the strategies' clans.
        members: of the strategies whose names do not say.

    Raises:
        ConfigError: for a name that is none of these, or a peer whose package is not installed.
    """
    methods: list[Method | OptimizerPeer] = []
    for name in names:
        if name in BASELINES:
            methods.append(BASELINES[name])
        elif name in OPTIMIZER_PEERS:
            OPTIMIZER_PEERS[name].check()
            methods.append(OPTIMIZER_PEERS[name])
        elif name in POPULATION_PEERS:
            imported("ray.tune.schedulers", method=name)
            peer = POPULATION_PEERS[name]
            methods.append(replace(peer, name=f"{name} P={population_size}", population_size=population_size))
        elif name.removesuffix(LINE) in STRATEGIES or ":" in name:
            methods.append(_strategy(name, population_size, members))
        else:
            known = sorted({*BASELINES, *OPTIMIZER_PEERS, *POPULATION_PEERS, *STRATEGIES})
            raise ConfigError(f"no method {name!r}.{did_you_mean(name, known)} Choose from: {', '.join(known)}.")
    return methods


def _strategy(name: str, population_size: int, members: Literal["groups", "line"]) -> Method:
    """A strategy's row: named so that both forms of one strategy stand side by side in a table."""
    plain = name.removesuffix(LINE)
    form: Literal["groups", "line"] = "line" if plain != name else members
    suffix = LINE if form == "line" else ""
    return Method(f"{plain}{suffix} P={population_size}", plain, population_size=population_size, members=form)


def read_variants(path: Path) -> list[Method]:
    """The methods in a JSON file: row names to fields of :class:`Method`.

    Raises:
        ConfigError: for an unknown field.
    """
    known = {item.name for item in fields(Method)} - {"name"}
    methods = []
    for name, given in json.loads(path.read_text()).items():
        unknown = sorted(set(given) - known)
        if unknown:
            hint = did_you_mean(unknown[0], sorted(known))
            raise ConfigError(
                f"variant {name!r} in {path} has no field {unknown[0]!r}.{hint} It takes: {sorted(known)}."
            )
        methods.append(Method(**{"strategy": "clan", **given, "name": name}))
    return methods


def _gene(name: str) -> Gene:
    """The catalogue's; a label after a colon is the parameter group that it is for."""
    target, colon, group = name.partition(":")
    gene = CATALOGUE[target]
    return replace(gene, name=name, target=target, groups=(group,)) if colon else gene


def _started(gene: Gene, settings: Settings) -> Gene:
    """An absolute gene starts at what the run is configured with, as in a real one."""
    if gene.relative:
        return gene
    low, high = gene.bounds
    return replace(gene, initial=min(max(settings.base()[gene.target], low), high))
