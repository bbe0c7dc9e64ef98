"""Genes and genomes: named scalars that a member inherits, each in its own scale and with its own step size."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clantune_scale.errors import ConfigError

Kind = Literal["optimizer", "specialized"]
Scale = Literal["log", "linear", "logit"]
Consensus = Literal["mean", "median"]

_ENCODE: dict[str, Callable[[float], float]] = {
    "log": math.log,
    "linear": float,
    "logit": lambda value: math.log(value / (1.0 - value)),
}
_DECODE: dict[str, Callable[[float], float]] = {
    "log": math.exp,
    "linear": float,
    "logit": lambda x: 1.0 / (1.0 + math.exp(-x)),
}

#: By gene target: its key in an optimizer's parameter group, and the index in a tuple or None.
GROUP_KEYS: dict[str, tuple[str, int | None]] = {
    "lr": ("lr", None),
    "weight_decay": ("weight_decay", None),
    "beta1": ("betas", 0),
    "beta2": ("betas", 1),
    "eps": ("eps", None),
    "momentum": ("momentum", None),
}


@dataclass(frozen=True)
class Gene:
    """One schedulable scalar: what it is called, what it sets, and the scale in which it varies.

    Attributes:
        name: unique in the genome, for example ``"lr"`` or ``"lr:head"``.
        kind: ``"optimizer"`` genes act on how a gradient is applied and are expressed always;
            ``"specialized"`` genes act on the gradient itself and are expressed only when competing.
        scale: the scale in which the gene mutates: log, linear, or logit for values between 0 and 1.
        bounds: lowest and highest value (not encoded), both allowed.
        initial: the value that every member starts from.
        step_size: initial standard deviation of a change, in scale units.
        max_change: largest move of the clan's value in one round, in scale units.
        consensus: how the clan's one value is formed while the gene is not expressed.
        integer: whether the value that is expressed is rounded to a whole number.
        relative: whether the value multiplies the user's own scheduled value.
        target: what the gene sets, for example ``"weight_decay"``; the name if empty.
        groups: names of the optimizer's parameter groups that it is written to; all if None.
    """

    name: str
    kind: Kind = "optimizer"
    scale: Scale = "log"
    bounds: tuple[float, float] = (1e-3, 1e3)
    initial: float = 1.0
    step_size: float = 0.1
    max_change: float = 0.8
    consensus: Consensus = "mean"
    integer: bool = False
    relative: bool = False
    target: str = ""
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(f"gene {self.name!r} has bounds [{low}, {high}]. Give two finite numbers, low < high.")
        if self.scale == "log" and low <= 0:
            raise ConfigError(
                f"gene {self.name!r} varies on a log scale and has the lower bound {low}. "
                f"Raise it above 0, or set scale to 'linear'."
            )
        if self.scale == "logit" and not (low > 0 and high < 1):
            raise ConfigError(
                f"gene {self.name!r} varies on a logit scale and has bounds [{low}, {high}]. "
                f"Keep both strictly between 0 and 1, or set scale to 'linear'."
            )
        if not low <= self.initial <= high:
            raise ConfigError(
                f"gene {self.name!r} starts at {self.initial}, outside its bounds [{low}, {high}]. "
                f"Widen the bounds or change the start."
            )
        if not self.step_size > 0 or not self.max_change > 0:
            raise ConfigError(
                f"gene {self.name!r} has step_size {self.step_size} and max_change {self.max_change}. "
                f"Both must be above 0; to hold a gene still, leave it out of `genes`."
            )
        if not self.target:
            object.__setattr__(self, "target", self.name)

    def encode(self, value: float) -> float:
        """The value in scale units (for example, its logarithm)."""
        return _ENCODE[self.scale](value)

    def decode(self, x: float) -> float:
        """A value from scale units, clipped to the bounds so that rounding cannot leave them."""
        low, high = self.bounds
        return min(max(_DECODE[self.scale](x), low), high)

    def times(self, value: float, factor: float) -> float:
        """``factor`` times ``value``, in scale units and not yet inside the bounds.

        If the scale is logit, the odds are multiplied. 1.2 times a momentum of 0.9 is above 1. 1.2 times its odds of 9
        is a momentum of 0.915.

        Args:
            value: not encoded.
            factor: above 0.
        """
        return value * factor if self.scale == "linear" else self.encode(value) + math.log(factor)

    def ratio(self, value: float, reference: float) -> float:
        """The factor from ``reference`` to ``value``; between their odds if the scale is logit."""
        return value / reference if self.scale == "linear" else math.exp(self.encode(value) - self.encode(reference))

    def reflect(self, x: float) -> float:
        """``x`` (scale units) reflected at the encoded bounds until it lies between them."""
        low, high = (self.encode(bound) for bound in self.bounds)
        width = high - low
        folded = (x - low) % (2 * width)
        return low + (folded if folded <= width else 2 * width - folded)

    def expressed(self, value: float) -> float:
        """The value as it takes effect: a whole number for integer genes."""
        low, high = self.bounds
        return min(max(float(round(value)), math.ceil(low)), math.floor(high)) if self.integer else value


@dataclass(frozen=True)
class Genome:
    """Values (not encoded) and step sizes (scale units) of one member, by gene name."""

    values: Mapping[str, float]
    step_sizes: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def initial(cls, genes: Sequence[Gene]) -> Genome:
        """Every gene at the value and step size that the run starts with."""
        return cls({g.name: g.initial for g in genes}, {g.name: g.step_size for g in genes})

    def digest(self) -> str:
        """Hex digest of names and exact values: equal if and only if the genomes are."""
        state = hashlib.blake2b(digest_size=16)
        for table in (self.values, self.step_sizes):
            for name in sorted(table):
                state.update(name.encode() + b"\0" + struct.pack("<d", table[name]))
        return state.hexdigest()


def chosen_groups(groups: Sequence[dict[str, Any]], names: tuple[str, ...] | list[str] | None) -> list[dict[str, Any]]:
    """The groups with these names (their ``"name"``, else their index); all if no names are given."""
    if names is None:
        return list(groups)
    return [group for index, group in enumerate(groups) if str(group.get("name", index)) in names]


def replaces_schedule(genes: Sequence[Gene], group: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> bool:
    """Whether one of the genes replaces the user's own schedule in that group's learning rate."""
    absolute = [gene for gene in genes if gene.target == "lr" and not gene.relative]
    return any(group is chosen for gene in absolute for chosen in chosen_groups(groups, gene.groups))
