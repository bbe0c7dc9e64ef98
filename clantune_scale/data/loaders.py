"""Samplers and loaders that follow a clan's phases, and windows that all its members are measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from clantune_scale.config.schema import FitnessConfig
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader, StepPlan
from clantune_scale.errors import ConfigError
from clantune_scale.runtime.engine_protocol import Backend
from clantune_scale.runtime.validation_window import ValidationWindow

if TYPE_CHECKING:
    from clantune_scale.runtime.clan import Clan


def step_plan(clan: Clan, step: int) -> StepPlan:
    """What a step reads, as far as it is decided today: loaders that prefetch ask ahead of training."""
    phase = clan.phases.clock.at(step).phase
    return StepPlan.of(phase, clan.accumulation(phase.kind), clan.member)


def make_sampler(clan: Clan, num_samples: int, *, shuffle: bool = True) -> ClanBatchSampler:
    """This rank's batch sampler over a dataset of ``num_samples``."""
    return ClanBatchSampler(
        num_samples,
        seed=clan.config.seed,
        micro_batch_size=clan.backend.micro_batch_size,
        dp_size=clan.backend.dp_size,
        dp_rank=clan.backend.dp_rank,
        member=clan.member,
        population_size=clan.config.population_size,
        plan=lambda step: step_plan(clan, step),
        shuffle=shuffle,
    )


def make_loader(clan: Clan, dataset: Dataset, **options: Any) -> ClanDataLoader:
    """This rank's loader over a map-style dataset; ``options`` go to torch's ``DataLoader``.

    Raises:
        ConfigError: if the dataset has no length or no index, so that samples cannot be read again.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"training_data is a {type(dataset).__name__} without __len__ or __getitem__, and competing members "
            f"must read the same samples again. Pass a map-style dataset, or make your own loader."
        )
    sampler = clan.sampler(len(dataset))
    return ClanDataLoader(dataset, sampler, on_first=clan.rounds.ready_data, **options)


def make_window(
    backend: Backend,
    fitness: FitnessConfig,
    dataset: Dataset,
    *,
    num_samples: int | None = None,
    collate_fn: Callable[[list], Any] | None = None,
) -> ValidationWindow:
    """A window on a dataset, its batches shared out over a member's ranks.

    Args:
        backend: the member's engine.
        fitness: the block's.
        dataset: map-style.
        num_samples: in place of the block's.
        collate_fn: joins samples to a batch; torch's default where None.

    Raises:
        ConfigError: if the dataset has no length, or fewer examples than the member has data-parallel ranks.
    """
    return ValidationWindow(
        dataset,
        num_samples=num_samples or fitness.num_samples,
        batch_size=fitness.batch_size or backend.micro_batch_size,
        dp_rank=backend.dp_rank,
        dp_size=backend.dp_size,
        collate_fn=collate_fn,
    )
