"""``clantune_scale.attach_megatron``: a clan on Megatron-core's model and optimizer, in a loop of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import Unpack

from clantune_scale.backends.megatron.engine import MegatronBackend
from clantune_scale.backends.megatron.rules import only_chunk
from clantune_scale.config.batch import ACCUMULATION, CLIPPING, MICRO, clipping_of, split_batch, with_arguments
from clantune_scale.config.deepspeed_file import load_config, require_block
from clantune_scale.config.schema import ClanConfig
from clantune_scale.distributed import world
from clantune_scale.distributed.one_world import one_world
from clantune_scale.distributed.world import ClanWorld
from clantune_scale.errors import ConfigError, TopologyError
from clantune_scale.runtime.arguments import LoopArguments, shares
from clantune_scale.runtime.attach import attach_to, require_examples
from clantune_scale.runtime.clan import Clan


class MegatronClan(Clan):
    """A clan in a loop of the user's own; see :func:`attach_megatron`."""

    backend: MegatronBackend

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of the next step, to pass to Megatron's schedule."""
        return self.backend.accumulation

    @property
    def micro_batch_size(self) -> int:
        """Sequences per rank and backward pass, to pass to Megatron's schedule."""
        return self.backend.micro_batch_size


@shares(LoopArguments)
def attach_megatron(
    model: Any,
    optimizer: Any,
    scheduler: Any = None,
    *,
    forward_step: Callable[..., Any],
    seq_length: int,
    num_microbatches: int | None = None,
    **arguments: Unpack[LoopArguments],
) -> MegatronClan:
    """Attaches a clan to a Megatron-core model; the training loop stays Megatron's.

    With ``"members": "line"`` call it once model and optimizer exist. With ``"members": "groups"`` call
    ``clantune_scale.join(config)`` first, before ``init_process_group``: from there on the world, and with it
    ``parallel_state``, is the member's. The loop is then::

        clan = clantune_scale.attach_megatron(model, optimizer, scheduler, config=config, ...)
        batches = ...  # over clan.loader(dataset), again and again
        while clan.num_steps < num_steps:
            model.zero_grad_buffer()
            optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=batches, model=[model],
                num_microbatches=clan.num_microbatches, micro_batch_size=clan.micro_batch_size, ...
            )
            is_updated, *_ = optimizer.step()
            if is_updated:
                scheduler.step(increment=1)
        clan.finish()

    A round's end (evaluation, cloning) happens inside the call that ends the step. Megatron's calculator of the number
    of micro-batches follows the clan if it is used.

    Args:
        model: Megatron's ``DistributedDataParallel``, or a list of one; replicas equal, as for Megatron itself.
        optimizer: from ``get_megatron_optimizer``. Its ``clip_grad`` is the threshold; a config that has a
            ``gradient_clipping`` must have the same.
        scheduler: Megatron's ``OptimizerParamScheduler``; goes with a clone, and ends each step. None if there is none
            or it moves otherwise.
        forward_step: the ``(data_iterator, model) -> (output, loss_func)`` that training gives to the schedule. It gets
            the batches of ``eval_data`` too.
        seq_length: tokens of a sequence.
        num_microbatches: micro-batches per optimizer step; None takes the config's, else 1. A gene may change it.
        {arguments}

    Returns:
        The clan, hooked onto model and optimizer.

    Raises:
        ConfigError: if the block, the model's parallelism or the optimizer cannot be used, a keyword or the optimizer
            contradicts the config, or there is nothing to evaluate on.
        TopologyError: if the clan was not joined before, or ranks do not form it.
    """
    settings, found = load_config(arguments["config"])
    block = require_block(found)
    require_examples(arguments["eval_data"], "attach_megatron")
    joined = _world(block)
    settings = with_arguments(
        settings,
        function="attach_megatron",
        given={
            MICRO: ("micro_batch_size", arguments.get("micro_batch_size")),
            ACCUMULATION: ("num_microbatches", num_microbatches),
        },
    )
    dp_size = only_chunk(model).dp_group.size()
    population_size = 1 if block.members == "line" else block.population_size
    _, batch = split_batch(settings, population_size=population_size, dp_size=dp_size)
    backend = MegatronBackend(
        model,
        optimizer,
        scheduler,
        forward_step=forward_step,
        seq_length=seq_length,
        micro_batch_size=batch.micro_batch,
        accumulation=batch.accumulation,
    )
    _require_same_clipping(settings, backend.clip)
    return attach_to(
        backend,
        MegatronClan,
        world=joined,
        block=joined.present(block),
        eval_data=arguments["eval_data"],
        evaluate=arguments.get("evaluate"),
        setters=arguments.get("gene_setters"),
        collate_fn=arguments.get("collate_fn"),
        total_steps=arguments.get("total_steps"),
        num_samples=arguments.get("num_samples"),
        train_step=arguments.get("train_step"),
        watch=arguments.get("watch"),
    )


def _world(block: ClanConfig) -> ClanWorld:
    if block.members == "line":
        return one_world(timeout_s=block.join.timeout_s)
    if world.current() is None:
        raise TopologyError(
            "the clan was not joined, and the model was built over the ranks of all members. Call "
            'clantune_scale.join(config) before torch.distributed.init_process_group(), or set "members" to '
            '"line", which needs no joining.'
        )
    # Raises if it was joined with another number of members.
    return world.join(block.population_size)


def _require_same_clipping(settings: Mapping[str, Any], clip: float) -> None:
    """The optimizer was built before the clan saw the config: a threshold in both must be the same."""
    written = clipping_of(settings)
    if written is not None and written != clip:
        raise ConfigError(
            f"the config says {CLIPPING}: {written:g}, and the optimizer has clip_grad={clip:g}. Build the optimizer "
            f"with OptimizerConfig(clip_grad={written:g}), or make {CLIPPING} {clip:g}."
        )
