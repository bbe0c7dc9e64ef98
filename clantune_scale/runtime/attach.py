"""What every way of attaching a clan to an engine ends with, and asks for first: examples that members are compared on.

Each way (``initialize``, ``attach``, ``attach_megatron``) joins the clan and builds the member's engine by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch.utils.data import Dataset

from clantune_scale.config.batch import BatchPlan
from clantune_scale.config.schema import ClanConfig
from clantune_scale.data.loaders import make_window
from clantune_scale.distributed.world import ClanWorld
from clantune_scale.errors import ConfigError
from clantune_scale.runtime.clan import Clan
from clantune_scale.runtime.engine_protocol import Backend
from clantune_scale.runtime.genome_application import Setter
from clantune_scale.runtime.validation_window import Evaluate

AnyClan = TypeVar("AnyClan", bound=Clan)


def require_examples(eval_data: Dataset[Any] | None, function: str) -> Dataset[Any]:
    """Refuses a clan that has nothing to compare its members on, before ranks wait for each other.

    Args:
        eval_data: what the user gave.
        function: to which, for the message.

    Returns:
        The same.

    Raises:
        ConfigError: if it is None.
    """
    if eval_data is None:
        raise ConfigError(
            f"a clan compares its members on common examples and there are none. Pass eval_data=... to {function}(), "
            f"a map-style dataset apart from the training and test data."
        )
    return eval_data


def attach_to(
    backend: Backend,
    kind: type[AnyClan],
    *,
    world: ClanWorld,
    block: ClanConfig,
    eval_data: Dataset,
    batch: BatchPlan | None = None,
    evaluate: Evaluate | None = None,
    setters: Mapping[str, Setter] | None = None,
    collate_fn: Callable[[list], Any] | None = None,
    total_steps: int | None = None,
    num_samples: int | None = None,
) -> AnyClan:
    """Hooks a clan onto a member's engine, with a window on ``eval_data`` as the block's ``fitness`` says.

    Args:
        backend: the member's engine.
        kind: of clan.
        world: from joining.
        block: for the members that are present.
        eval_data: map-style dataset on which selection compares members.
        batch: how the clan's batch is divided; the engine's own on every member where None.
        evaluate: ``(engine, batch) -> loss`` in place of the model's own loss, or None.
        setters: by target, for genes that the user registers.
        collate_fn: joins validation samples to a batch; torch's default where None.
        total_steps: optimizer steps of the whole run, where the block does not say.
        num_samples: of the training data, for the default genes; None where nobody knows.

    Raises:
        ConfigError: if the genes, the data or the engine cannot be used.
        TopologyError: if ranks do not form the clan.
    """
    if batch is None:
        batch = BatchPlan.of_members(
            block.population_size,
            micro_batch=backend.micro_batch_size,
            accumulation=backend.accumulation,
            dp_size=backend.dp_size,
        )
    return kind(
        world=world,
        backend=backend,
        config=block,
        batch=batch,
        window=make_window(backend, block.fitness, eval_data, collate_fn=collate_fn),
        evaluate=evaluate,
        setters=setters,
        total_steps=block.total_steps or total_steps,
        num_samples=num_samples,
    )
