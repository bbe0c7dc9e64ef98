"""Samplers and loaders that follow a clan's phases, and windows that all its members are measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from clantune_scale.config.schema import FitnessConfig
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader, StepPlan, is_map_style
from clantune_scale.errors import ConfigError
from clantune_scale.runtime.engine_protocol import EnginePlace
from clantune_scale.runtime.validation_window import ValidationWindow
from clantune_scale.runtime.view import ClanView


def make_sampler(
    view: ClanView, num_samples: int, *, accumulation: Callable[[PhaseKind], Sequence[int]], shuffle: bool = True
) -> ClanBatchSampler:
    """This rank's batch sampler over a dataset.

    Args:
        view: the clan on this rank.
        num_samples: length of the dataset.
        accumulation: kind of phase to [members] micro-batches per step, as far as it is decided now: loaders that
            prefetch ask for steps ahead of training.
        shuffle: whether each epoch has an order of its own.
    """

    def plan(step: int) -> StepPlan:
        phase = view.phases.clock.at(step).phase
        counts = accumulation(phase.kind)
        if view.has_one_state:  # all ranks train one model, whatever the phase
            return StepPlan(False, counts[0], counts[0])
        return StepPlan.of(phase, counts, view.member)

    return ClanBatchSampler(
        num_samples,
        seed=view.config.seed,
        micro_batch_size=view.backend.micro_batch_size,
        dp_size=view.backend.dp_size,
        dp_rank=view.backend.dp_rank,
        member=view.member,
        population_size=view.world.topology.population_size,
        plan=plan,
        shuffle=shuffle,
    )


def make_loader(
    dataset: Dataset,
    sampler: Callable[[int], ClanBatchSampler],
    *,
    on_first: Callable[[], None],
    on_next: Callable[[], None],
    **options: Any,
) -> ClanDataLoader:
    """This rank's loader over a map-style dataset.

    Args:
        dataset: map-style.
        sampler: makes the batch sampler from the dataset's length.
        on_first: called before the first batch is read.
        on_next: called before each batch is read.
        options: for torch's ``DataLoader``.

    Raises:
        ConfigError: if the dataset has no length or no index, so that samples cannot be read again.
    """
    if not is_map_style(dataset):
        raise ConfigError(
            f"training_data is a {type(dataset).__name__} without __len__ or __getitem__, and competing members "
            f"must read the same samples again. Pass a map-style dataset, or make your own loader."
        )
    length = len(dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length
    return ClanDataLoader(dataset, sampler(length), on_first=on_first, on_next=on_next, **options)


def make_window(
    backend: EnginePlace,
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
        num_samples: in place of the block's, or None.
        collate_fn: joins samples to a batch; None for torch's default.

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
