"""``clantune_scale.attach_megatron``: a clan on Megatron-core's model and optimizer, in a loop of the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import Dataset

from clantune_scale.backends.megatron.engine import MegatronBackend
from clantune_scale.config.schema import ClanConfig
from clantune_scale.distributed import world
from clantune_scale.distributed.join import read_block
from clantune_scale.errors import TopologyError
from clantune_scale.runtime.attach import attach_to, require_examples
from clantune_scale.runtime.clan import Clan
from clantune_scale.runtime.genome_application import Setter
from clantune_scale.runtime.validation_window import Evaluate


class MegatronClan(Clan):
    """A clan in a loop of the user's own; see :func:`attach_megatron`."""

    backend: MegatronBackend

    @property
    def num_steps(self) -> int:
        """Optimizer steps that are done, skipped ones among them."""
        return self.backend.num_steps

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of the step that comes, as Megatron's schedule is to be given them."""
        return self.backend.accumulation


def attach_megatron(
    model: Any,
    optimizer: Any,
    scheduler: Any = None,
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | ClanConfig,
    forward_step: Callable[..., Any],
    seq_length: int,
    micro_batch_size: int,
    num_microbatches: int = 1,
    eval_data: Dataset,
    evaluate: Evaluate | None = None,
    gene_setters: Mapping[str, Setter] | None = None,
    collate_fn: Callable[[list], Any] | None = None,
    total_steps: int | None = None,
    num_samples: int | None = None,
) -> MegatronClan:
    """Attaches a clan to a Megatron-core model; the training loop stays Megatron's.

    ``clantune_scale.join(config)`` comes first of all, before ``init_process_group``: from there on the world, and
    with it ``parallel_state``, is the member's. Then the loop is::

        clan = clantune_scale.attach_megatron(model, optimizer, scheduler, config=config, ...)
        batches = ...  # over clan.loader(dataset), again and again
        while clan.num_steps < num_steps:
            model.zero_grad_buffer()
            optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=batches, model=[model],
                num_microbatches=clan.num_microbatches, ...
            )
            is_updated, *_ = optimizer.step()
            if is_updated:
                scheduler.step(increment=1)
        clan.finish()

    A round's end (evaluation, cloning) is inside the call that ends the step. Megatron's calculator of the number of
    micro-batches follows the clan where it is used.

    Args:
        model: Megatron's ``DistributedDataParallel``, or a list of one; replicas equal, as for Megatron itself.
        optimizer: from ``get_megatron_optimizer``.
        scheduler: Megatron's ``OptimizerParamScheduler``; goes with a clone, and ends each step. None where there is
            none or it moves otherwise.
        config: the ``clantune`` block, or a dict or JSON file that has it under that name.
        forward_step: the ``(data_iterator, model) -> (output, loss_func)`` that training gives to the schedule.
        seq_length: tokens of a sequence.
        micro_batch_size: sequences per rank and backward pass.
        num_microbatches: micro-batches per optimizer step; a gene may change it.
        eval_data: map-style dataset on which selection compares members; ``forward_step`` gets its batches too.
        evaluate: ``(model, batch) -> loss`` in place of ``forward_step``, run on all stages at once; what the last
            pipeline stage returns counts.
        gene_setters: by target name, a function that puts a gene's value into effect.
        collate_fn: joins validation samples to a batch; torch's default where None.
        total_steps: optimizer steps of the whole run, where the block does not say.
        num_samples: of the training data: where no sample is seen twice, weight decay is a gene by default.

    Returns:
        The clan, hooked onto model and optimizer.

    Raises:
        ConfigError: if the block, the model's parallelism or the optimizer cannot be used, or there is nothing to
            evaluate on.
        TopologyError: if the clan was not joined before, or ranks do not form it.
    """
    block = read_block(config)
    require_examples(eval_data, "attach_megatron")
    if world.current() is None:
        raise TopologyError(
            "the clan was not joined, and the model was built over the ranks of all members. Call "
            "clantune_scale.join(config) before torch.distributed.init_process_group()."
        )
    # Raises where it was joined with another number of members.
    joined = world.join(block.population_size)
    block = joined.present(block)
    backend = MegatronBackend(
        model,
        optimizer,
        scheduler,
        forward_step=forward_step,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        accumulation=num_microbatches,
    )
    return attach_to(
        backend,
        MegatronClan,
        world=joined,
        block=block,
        eval_data=eval_data,
        evaluate=evaluate,
        setters=gene_setters,
        collate_fn=collate_fn,
        total_steps=total_steps,
        num_samples=num_samples,
    )
