"""What a batched clan trains: a loss over many models at once, its data, and what its optimizer is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from clantune_scale.bench.batched.optimizers import OPTIMIZERS
from clantune_scale.errors import ConfigError

Tensors = Sequence[torch.Tensor]
Knobs = Mapping[str, torch.Tensor]


class BatchedModel(Protocol):
    """A small model and its data, pure functions throughout.

    Attributes:
        batch_size: samples of one ``batch``: what a clan's members share out in a step.
        validation: the common window, tensors [examples, ...].
        group_of: [parameters] the name of each one's parameter group; empty if there is one group.
    """

    batch_size: int
    validation: Tensors
    group_of: Sequence[str]

    def init(self, seed: int) -> Tensors:
        """One model's initial parameters."""

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        """Training samples, tensors [batch_size, ...]; ``part`` counts the batches of one step, from 0.

        What training draws at random (noise, dropout masks) is drawn here, so that a step can be repeated.
        """

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        """[models, samples]: the loss of each model on each of its samples.

        Args:
            parameters: [models, ...] each.
            batch: [models, samples, ...] each; or of ``validation``'s kind, without what is random in training.
            knobs: [models] each; what genes set besides the optimizer (dropout, say), by target.
        """


def vectorized(
    losses: Callable[[Tensors, Tensors, Knobs], torch.Tensor],
) -> Callable[[Tensors, Tensors, Knobs], torch.Tensor]:
    """:meth:`BatchedModel.losses` from the losses of one model: parameters and samples to [samples].

    ``torch.func.vmap`` carries it over to all models; losses written for many models at once are faster.
    """

    def batched(parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return torch.func.vmap(losses)(list(parameters), list(batch), dict(knobs))

    return batched


def constant(step: int) -> float:
    """The schedule of a run without one."""
    return 1.0


@dataclass(frozen=True)
class Settings:
    """What one clan's user configured, before any gene.

    Attributes:
        optimizer: a name in ``OPTIMIZERS`` (``"adamw"``, ``"sgd"``, ...); the same for all clans of a batch.
        lr: base learning rate.
        weight_decay: decoupled or coupled, as the optimizer has it in torch.
        hyper: further hyperparameters of the optimizer, by name (``beta1``, ``momentum``, ...).
        schedule: factor on the learning rate in the step after so many.
        clip: largest global norm of the gradient; 0 for no clipping.
        num_micro_batches: of a member in a step; members share out so many batches of the model's.
        knobs: the model's own, by name.
        group_rates: by parameter group, what its learning rate is times ``lr``; groups that are not named have ``lr``.

    Raises:
        ConfigError: for an unknown optimizer or hyperparameter.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    hyper: Mapping[str, float] = field(default_factory=dict)
    schedule: Callable[[int], float] = constant
    clip: float = 0.0
    num_micro_batches: int = 1
    knobs: Mapping[str, float] = field(default_factory=dict)
    group_rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"there is no batched optimizer {self.optimizer!r}. Choose from: {', '.join(OPTIMIZERS)}."
            )
        known = OPTIMIZERS[self.optimizer].defaults
        unknown = sorted(set(self.hyper) - set(known))
        if unknown:
            raise ConfigError(
                f"the batched {self.optimizer} has no hyperparameter {unknown[0]!r}. Choose from: {', '.join(known)}."
            )

    def base(self) -> dict[str, float]:
        """Every scalar that a gene of that target may set, at its configured value."""
        rule = OPTIMIZERS[self.optimizer]
        scalars = {"lr": self.lr, "weight_decay": self.weight_decay, **rule.defaults, **self.hyper}
        return {**scalars, "clip": self.clip, "accumulation": float(self.num_micro_batches), **self.knobs}
