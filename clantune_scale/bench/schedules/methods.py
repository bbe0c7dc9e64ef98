"""Who competes: a strategy with its options and the clan it runs in, by a name for the table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from clantune_scale.batched import Settings
from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies import STRATEGIES, build
from clantune_scale.core.strategies.base import RunFacts, Strategy
from clantune_scale.errors import ConfigError
from clantune_scale.genes import CATALOGUE
from clantune_scale.spelling import did_you_mean

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
        genes: in place of the problem's.
    """

    name: str
    strategy: str
    options: Mapping[str, object] = field(default_factory=dict)
    population_size: int = 8
    round_length_steps: int | None = None
    duty_cycle: float = 0.1
    schedule: str | None = None
    genes: Sequence[str] | None = None

    def build(self, problem: Problem, settings: Settings, seed: int) -> Strategy:
        """The strategy of one run that is configured with ``settings``."""
        names = problem.genes if self.genes is None else self.genes
        genes = tuple(_started(CATALOGUE[name], settings) for name in names)
        facts = RunFacts(
            population_size=self.population_size,
            genes=genes,
            seed=seed,
            round_length_steps=self.round_length_steps or max(1, problem.total_steps // ROUNDS_PER_RUN),
            duty_cycle=self.duty_cycle,
            total_steps=problem.total_steps if problem.knows_length else None,
            has_schedule=problem.schedule != "constant" or self.schedule is not None,
        )
        return build(self.strategy, facts, self.options)


#: A run as its start configures it: one member, no rounds to speak of.
FIXED = Method("fixed", "control", population_size=1, round_length_steps=1_000_000)
WARMUP_LINEAR = replace(FIXED, name="warmup-linear", schedule="warmup-linear")
BASELINES = {method.name: method for method in (FIXED, WARMUP_LINEAR)}


def named(names: Sequence[str], population_size: int) -> list[Method]:
    """The baselines and strategies of these names, strategies with ``population_size`` members.

    Raises:
        ConfigError: for a name that is neither.
    """
    methods = []
    for name in names:
        if name in BASELINES:
            methods.append(BASELINES[name])
        elif name in STRATEGIES or ":" in name:
            methods.append(Method(f"{name} P={population_size}", name, population_size=population_size))
        else:
            known = sorted({*BASELINES, *STRATEGIES})
            raise ConfigError(f"no method {name!r}.{did_you_mean(name, known)} Choose from: {', '.join(known)}.")
    return methods


def read_variants(path: Path) -> list[Method]:
    """The methods in a JSON file: row names to fields of :class:`Method`.

    Raises:
        ConfigError: for a field that there is not.
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


def _started(gene: Gene, settings: Settings) -> Gene:
    """An absolute gene starts at what the run is configured with, as in a real one."""
    if gene.relative:
        return gene
    low, high = gene.bounds
    return replace(gene, initial=min(max(settings.base()[gene.target], low), high))
