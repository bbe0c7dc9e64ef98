"""One module per engine: how the contract suite starts it, trains it, and reads its weights.

Each family module has ``CASES`` (ids to :class:`Setup`), ``TOLERANCE`` (by dtype, against the engine's own data
parallelism), ``MICRO`` (samples of a micro-batch), ``start(setup, block)``, ``twin()``, ``twin_loss(module, batch)``
and ``datasets()``; ``PRELOAD`` where its ranks are forked from a server that has another engine loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import clantune_scale

FAMILIES = ("zero", "pipeline", "deepspeed_tp", "deepspeed_moe", "fsdp", "ddp", "megatron")


@dataclass(frozen=True)
class Setup:
    """One topology and precision that an engine is run in.

    Attributes:
        members, dp, pp, tp: the grid of ranks.
        dtype: ``"fp32"`` or ``"bf16"``.
        accumulation: micro-batches per step.
        clip: gradient-norm threshold, 0 for none.
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr: learning rate.
        is_tied: whether two layers share a weight.
        tolerance: of weights against the engine's own data parallelism, in place of the family's.
        is_slow: run with ``-m slow`` only.
        options: the family's own.
    """

    members: int = 2
    dp: int = 1
    pp: int = 1
    tp: int = 1
    dtype: str = "fp32"
    accumulation: int = 1
    clip: float = 0.0
    optimizer: str = "adamw"
    lr: float = 1e-2
    is_tied: bool = False
    tolerance: float | None = None
    is_slow: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def member_size(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def world_size(self) -> int:
        return self.members * self.member_size


class Run(Protocol):
    """A training run on one rank."""

    clan: Any

    def train(self, num_steps: int) -> None:
        """On to ``num_steps`` optimizer steps in all, in the clan's order of the data."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Every fp32 weight of the member by the twin's names, equal on all its ranks; a member collective."""


def join_groups(block: dict | None) -> None:
    """Joins a clan whose members are groups of ranks; members on the line need no joining."""
    if block is not None and block.get("members") != "line":
        clantune_scale.join(block)


def is_on_line(clan: Any) -> bool:
    """Whether a run has a clan whose members lie on a line."""
    return clan is not None and clan.config.members == "line"


def family(name: str) -> Any:
    """The module of a family, imported where it is used: some engines take seconds."""
    return importlib.import_module(f"tests.backends.families.{name}")
