"""``clantune_scale.attach``: a clan in a plain PyTorch loop, with FSDP2 or DDP."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from clantune_scale.backends.torch.ddp import DDPBackend
from clantune_scale.backends.torch.engine import LoopBackend
from clantune_scale.backends.torch.fsdp import FSDPBackend
from clantune_scale.config.schema import ClanConfig
from clantune_scale.distributed.join import join, read_block
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.runtime.attach import attach_to, require_examples
from clantune_scale.runtime.clan import Clan
from clantune_scale.runtime.genome_application import Setter
from clantune_scale.runtime.validation_window import Evaluate


class LoopClan(Clan):
    """A clan in a loop of the user's own; see :func:`attach`."""

    backend: LoopBackend

    @property
    def num_steps(self) -> int:
        """Optimizer steps that are done."""
        return self.backend.num_steps

    def steps(self, loader: Iterable[Any], *, until: int | None = None) -> Iterator[Step]:
        """One :class:`Step` for each optimizer step, over ``loader`` again and again.

        Args:
            loader: gives micro-batches; :meth:`loader` makes one that follows the phases.
            until: optimizer steps in all after which it ends; without end where None.

        Raises:
            ClanError: if a step was taken up and ``optimizer.step()`` was not called in it.
        """
        batches = _endless(loader)
        while until is None or self.num_steps < until:
            before = self.num_steps
            yield Step(self.backend, batches)
            if self.num_steps == before:
                raise ClanError(
                    f"no optimizer step was taken after {before}. Inside `for step in clan.steps(loader)`, call "
                    f"optimizer.step() once (and scheduler.step() after it, where attach() was given a scheduler)."
                )

    def clip_grad_norm_(self) -> torch.Tensor:
        """[] the gradient norm of the member; scales gradients down to the threshold in effect.

        In place of torch's: the threshold may be a gene, and some parameters may be tensor-parallel and others not.
        Where it is not called, the same is done just before the optimizer's update.
        """
        return self.backend.clip_gradients()


class Step:
    """One optimizer step's micro-batches: as many as the accumulation in effect says, ``len(step)``.

    Gradients cross ranks in the last one alone. Divide each loss by ``len(step)``.
    """

    def __init__(self, backend: LoopBackend, batches: Iterator[Any]) -> None:
        self._backend, self._batches = backend, batches
        self._size = backend.accumulation

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._size):
            batch = next(self._batches)
            with self._backend.exchanging(number == self._size - 1):
                yield batch


def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | ClanConfig,
    eval_data: Dataset,
    micro_batch_size: int,
    accumulation: int = 1,
    gradient_clipping: float = 0.0,
    evaluate: Evaluate | None = None,
    gene_setters: Mapping[str, Setter] | None = None,
    collate_fn: Callable[[list], Any] | None = None,
    total_steps: int | None = None,
    num_samples: int | None = None,
) -> LoopClan:
    """Attaches a clan to a model that ``fully_shard`` or ``DistributedDataParallel`` was applied to.

    ``clantune_scale.join(config)`` comes first of all, before ``init_process_group``: from there on the world, and
    every mesh and group, is the member's. Then the loop is::

        clan = clantune_scale.attach(model, optimizer, scheduler, config=config, ...)
        for step in clan.steps(clan.loader(dataset), until=num_steps):
            for batch in step:
                (model(batch) / len(step)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        clan.finish()

    A loop of another form works as well: one that calls ``optimizer.step()`` after ``clan.backend.accumulation``
    micro-batches, and ``scheduler.step()`` once after each where there is one. A round's end (evaluation, cloning)
    is inside the call that ends the step. Losses are seen where the model returns them, or where a mapping or
    object that it returns has a ``loss``; a model that returns logits trains all the same, with ``evaluate``.

    Args:
        model: what the loop calls; ``torch.compile`` may be around it or in it.
        optimizer: made from the model's parameters after they were sharded.
        scheduler: goes with a clone, and ends each step; None where there is none or it moves otherwise.
        config: the ``clantune`` block, or a dict or JSON file that has it under that name.
        eval_data: map-style dataset on which selection compares members. Keep a test split apart from it.
        micro_batch_size: samples per rank and backward pass.
        accumulation: micro-batches per optimizer step; a gene may change it.
        gradient_clipping: gradient-norm threshold, 0 for none; a gene may change it.
        evaluate: ``(model, batch) -> loss`` in place of the model's own output.
        gene_setters: by target name, a function that puts a gene's value into effect.
        collate_fn: joins validation samples to a batch; torch's default where None.
        total_steps: optimizer steps of the whole run, where the block does not say.
        num_samples: of the training data: where no sample is seen twice, weight decay is a gene by default.

    Returns:
        The clan, hooked onto model and optimizer.

    Raises:
        ConfigError: if the block, the model's parallelism or the optimizer cannot be used, or there is nothing to
            evaluate on.
        TopologyError: if a process group existed before the clan was joined, or ranks do not form the clan.
    """
    block = read_block(config)
    require_examples(eval_data, "attach")
    if not dist.is_initialized():
        raise ConfigError(
            "there is no process group yet, and so the model is not parallel. Call init_process_group() after "
            "clantune_scale.join(), apply fully_shard() or DDP, then attach()."
        )
    joined = join(block)
    block = joined.present(block)
    backend = _backend(
        model,
        optimizer,
        scheduler,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        gradient_clipping=gradient_clipping,
    )
    return attach_to(
        backend,
        LoopClan,
        world=joined,
        block=block,
        eval_data=eval_data,
        evaluate=evaluate,
        setters=gene_setters,
        collate_fn=collate_fn,
        total_steps=total_steps,
        num_samples=num_samples,
    )


def _backend(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, **options: Any) -> LoopBackend:
    """The backend for what the model is.

    Raises:
        ConfigError: if it is neither sharded by FSDP2 nor wrapped by DDP.
    """
    # torch.compile's module around a model is not an instance of what it compiles.
    module = getattr(model, "_orig_mod", model)
    if isinstance(module, DistributedDataParallel):
        return DDPBackend(model, module, optimizer, scheduler, **options)
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return FSDPBackend(model, module, optimizer, scheduler, **options)
    raise ConfigError(
        f"the model is a plain {type(module).__name__}, whose gradients nothing averages. Apply fully_shard() to it or "
        f"wrap it in DistributedDataParallel, also where a member has one rank."
    )


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Batches of one pass over ``loader`` after the other.

    Raises:
        ClanError: if a pass gives none.
    """
    while True:
        is_empty = True
        for batch in loader:
            is_empty = False
            yield batch
        if is_empty:
            raise ClanError("the loader gives no batch. Check its dataset's length against the batch size.")
