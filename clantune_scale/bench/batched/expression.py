"""From genomes to hyperparameters of all members of all clans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from clantune_scale.bench.batched.model import Settings
from clantune_scale.bench.batched.optimizers import OPTIMIZERS
from clantune_scale.core import decay
from clantune_scale.core.consensus import values_in_effect
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.core.strategies.base import Strategy
from clantune_scale.errors import ConfigError

_BEYOND_THE_OPTIMIZER = ("clip",)


@dataclass(frozen=True)
class Values:
    """What one clan's members are given in a phase.

    Attributes:
        scalars: [members], by target, before schedules.
        micro_batches: [members] of a step.
        group_rates: [members][groups] factors on the learning rate; empty if there is one group.
    """

    scalars: tuple[Mapping[str, float], ...]
    micro_batches: tuple[int, ...]
    group_rates: tuple[tuple[float, ...], ...]

    @classmethod
    def of(
        cls,
        genes: Sequence[Gene],
        genomes: Sequence[Genome],
        settings: Settings,
        kind: PhaseKind,
        groups: Sequence[str] = (),
    ) -> Values:
        """Every gene's own value, but the clan's for specialized genes while it cooperates.

        Args:
            genes: all of the clan's.
            genomes: [members].
            settings: the clan's.
            kind: of the phase.
            groups: names of the parameter groups; empty if there is one.

        Raises:
            ConfigError: for a gene that belongs to some parameter groups only and is no learning rate's factor, or
                sets what is not there.
        """
        effective = values_in_effect(genomes, genes, kind)
        common = [gene for gene in genes if not _is_group_rate(gene, groups)]
        members = tuple(_scalars(common, one, settings.base()) for one in effective)
        rates = tuple(tuple(_group_rate(genes, one, settings, group) for group in groups) for one in effective)
        return cls(members, tuple(round(scalars["accumulation"]) for scalars in members), rates)


class Expressed:
    """A phase's hyperparameters as tensors.

    Args:
        values: [clans], with the same targets.
        settings: [clans].
        strategies: [clans].
        dtype: of the knobs.
        sizes: [groups] runs of numbers in a row that belong to one group, with the groups in ``values`` in that order.

    Attributes:
        knobs: [clans x members] each, by target: what the model itself takes.
    """

    def __init__(
        self,
        values: Sequence[Values],
        settings: Sequence[Settings],
        strategies: Sequence[Strategy],
        *,
        dtype: torch.dtype = torch.float32,
        sizes: Sequence[int] = (),
    ) -> None:
        self._settings, self._strategies = settings, strategies
        rule = OPTIMIZERS[settings[0].optimizer]
        targets = ("lr", "weight_decay", *rule.defaults, *_BEYOND_THE_OPTIMIZER)
        self._hyper = {target: _column(values, target) for target in targets}
        if sizes:
            rates = torch.tensor([own.group_rates for own in values], dtype=torch.float64)
            rates = rates[:, :1] if bool((rates == rates[:, :1]).all()) else rates
            self._hyper["lr"] = self._hyper["lr"] * rates.repeat_interleave(torch.tensor(sizes), dim=2)
        names = [name for name in values[0].scalars[0] if name not in (*targets, "accumulation")]
        self.knobs = {name: _table(values, name).flatten().to(dtype) for name in names}

    def at(self, step: int) -> dict[str, torch.Tensor]:
        """[clans, members or 1, 1] float64 each, by name: what the update of that step takes."""
        return {**self._hyper, "lr": self._hyper["lr"] * self._factors(step)}

    def _factors(self, step: int) -> torch.Tensor:
        """[clans, 1, 1]: what schedules and the strategies' decay make of every learning rate."""
        factors = [rate_factor(*pair, step) for pair in zip(self._settings, self._strategies, strict=True)]
        return torch.tensor(factors, dtype=torch.float64).view(-1, 1, 1)


def rate_factor(settings: Settings, strategy: Strategy, step: int) -> float:
    """What the clan's schedule and its strategy's decay make of a learning rate in the step after so many."""
    scheduled, start = settings.schedule(step), strategy.decay_start_step
    reference = scheduled if start is None or step <= start else settings.schedule(start)
    return scheduled * decay.under_ceiling(strategy.lr_factor(step), reference=reference, scheduled=scheduled)


def _scalars(genes: Sequence[Gene], values: Mapping[str, float], base: dict[str, float]) -> dict[str, float]:
    for gene in genes:
        if gene.groups is not None or gene.target not in base:
            raise ConfigError(
                f"gene {gene.name!r} sets {gene.target!r} in groups {gene.groups}, and batched clans have one group of "
                f"parameters and {', '.join(base)}. Name one of these, without groups."
            )
        value = values[gene.name] * base[gene.target] if gene.relative else values[gene.name]
        base[gene.target] = gene.expressed(value)
    return base


def _is_group_rate(gene: Gene, groups: Sequence[str]) -> bool:
    return gene.groups is not None and gene.target == "lr" and gene.relative and bool(groups)


def _group_rate(genes: Sequence[Gene], values: Mapping[str, float], settings: Settings, group: str) -> float:
    own = [values[gene.name] for gene in genes if _is_group_rate(gene, [group]) and group in (gene.groups or ())]
    return settings.group_rates.get(group, 1.0) * math.prod(own)


def _table(values: Sequence[Values], target: str) -> torch.Tensor:
    """[clans, members] float64"""
    return torch.tensor([[scalars[target] for scalars in own.scalars] for own in values], dtype=torch.float64)


def _column(values: Sequence[Values], target: str) -> torch.Tensor:
    """[clans, members, 1], or [clans, 1, 1] if no clan's members differ."""
    table = _table(values, target).unsqueeze(-1)
    return table[:, :1] if bool((table == table[:, :1]).all()) else table
