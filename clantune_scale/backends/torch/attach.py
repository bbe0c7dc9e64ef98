"""``clantune_scale.attach``: a clan in a plain PyTorch loop, with FSDP2 or DDP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from clantune_scale.backends.join import join
from clantune_scale.backends.torch.ddp import DDPBackend
from clantune_scale.backends.torch.engine import LoopBackend
from clantune_scale.backends.torch.fsdp import FSDPBackend, data_parallel_size
from clantune_scale.config.batch import ACCUMULATION, CLIPPING, MICRO, clipping_of, split_batch, with_arguments
from clantune_scale.config.deepspeed_file import load_config, require_block
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.runtime.arguments import LoopArguments, shares
from clantune_scale.runtime.attach import attach_to, require_examples
from clantune_scale.runtime.clan import Clan


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
            until: optimizer steps of the whole run; None goes on without end.

        Raises:
            ClanError: if the loop's body did not call ``optimizer.step()``.
        """
        batches = _endless(loader)
        while until is None or self.num_steps < until:
            before = self.num_steps
            yield Step(self.backend, batches)
            if self.num_steps == before:
                raise ClanError(
                    f"no optimizer step was taken after {before}. Inside `for step in clan.steps(loader)`, call "
                    f"optimizer.step() once (and scheduler.step() after it, if attach() was given a scheduler)."
                )

    def clip_grad_norm_(self) -> torch.Tensor:
        """[] the gradient norm of the member; scales gradients down to the threshold in effect.

        Use it in place of torch's: the threshold may be a gene, and only some parameters may be tensor-parallel. If
        the loop does not call it, the clan clips just before the optimizer's update.
        """
        return self.backend.clip_gradients()


class Step:
    """One optimizer step's micro-batches: as many as the accumulation in effect says, ``len(step)``.

    Gradients cross ranks only in the last one. Divide each loss by ``len(step)``.
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


@shares(LoopArguments)
def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    *,
    accumulation: int | None = None,
    gradient_clipping: float | None = None,
    **arguments: Unpack[LoopArguments],
) -> LoopClan:
    """Attaches a clan to a model that ``fully_shard`` or ``DistributedDataParallel`` was applied to.

    Call ``clantune_scale.join(config)`` first, before ``init_process_group``: from there on the world, and every mesh
    and group, is the member's. The loop is then::

        clan = clantune_scale.attach(model, optimizer, scheduler, config=config, eval_data=validation)
        for step in clan.steps(clan.loader(dataset), until=num_steps):
            for batch in step:
                (model(*batch) / len(step)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        clan.finish()

    A loop of another form works too. It calls ``optimizer.step()`` after ``clan.backend.accumulation`` micro-batches,
    and ``scheduler.step()`` once after each if there is a scheduler. A round's end (evaluation, cloning) happens inside
    the call that ends the step.

    A validation batch reaches the model as ``model(**batch)`` if it is a mapping, as ``model(*batch)`` if it is a tuple
    or list, and else as ``model(batch)``, on the device of the parameters. The clan reads the loss that the model
    returns, or that a returned mapping or object has as ``loss``. A model that returns logits trains too; give
    ``evaluate`` then.

    Args:
        model: what the loop calls; ``torch.compile`` may be around it or in it.
        optimizer: made from the model's parameters after they were sharded.
        scheduler: goes with a clone, and ends each step; None if there is none or it moves otherwise.
        accumulation: micro-batches per optimizer step; None takes the config's, else 1. A gene may change it.
        gradient_clipping: gradient-norm threshold, 0 for none; None takes the config's, else 0. A gene may change it.
        {arguments}

    Returns:
        The clan, hooked onto model and optimizer.

    Raises:
        ConfigError: if the block, the model's parallelism or the optimizer cannot be used, a keyword contradicts the
            config, or there is nothing to evaluate on.
        TopologyError: if a process group existed before the clan was joined, or ranks do not form the clan.
    """
    settings, found = load_config(arguments["config"])
    block = require_block(found)
    require_examples(arguments["eval_data"], "attach")
    if not dist.is_initialized():
        raise ConfigError(
            "there is no process group yet, so the model is not parallel. Call init_process_group() after "
            "clantune_scale.join(), apply fully_shard() or DDP, then attach()."
        )
    joined = join(block)
    settings = with_arguments(
        settings,
        function="attach",
        given={
            MICRO: ("micro_batch_size", arguments.get("micro_batch_size")),
            ACCUMULATION: ("accumulation", accumulation),
            CLIPPING: ("gradient_clipping", gradient_clipping),
        },
    )
    backend = _backend(model, optimizer, scheduler, settings, population_size=block.population_size)
    return attach_to(
        backend,
        LoopClan,
        world=joined,
        block=joined.present(block),
        eval_data=arguments["eval_data"],
        evaluate=arguments.get("evaluate"),
        setters=arguments.get("gene_setters"),
        collate_fn=arguments.get("collate_fn"),
        total_steps=arguments.get("total_steps"),
        num_samples=arguments.get("num_samples"),
    )


def _backend(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    settings: Mapping[str, Any],
    *,
    population_size: int,
) -> LoopBackend:
    """The backend for what the model is, its batch a share of the clan's.

    Raises:
        ConfigError: if the model is neither sharded by FSDP2 nor wrapped by DDP, or the batch does not divide.
    """
    # torch.compile's module around a model is not an instance of what it compiles.
    module = getattr(model, "_orig_mod", model)
    if isinstance(module, DistributedDataParallel):
        options = _batch_and_clip(settings, population_size, dp_size=dist.get_world_size())
        return DDPBackend(model, module, optimizer, scheduler, **options)
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        options = _batch_and_clip(settings, population_size, dp_size=data_parallel_size(module))
        return FSDPBackend(model, module, optimizer, scheduler, **options)
    raise ConfigError(
        f"the model is a plain {type(module).__name__}, whose gradients nothing averages. Apply fully_shard() to it or "
        f"wrap it in DistributedDataParallel, also if a member has one rank."
    )


def _batch_and_clip(settings: Mapping[str, Any], population_size: int, *, dp_size: int) -> dict[str, Any]:
    # Members that died since the start do not change the share of those that are left.
    _, batch = split_batch(settings, population_size=population_size, dp_size=dp_size)
    return {
        "micro_batch_size": batch.micro_batch,
        "accumulation": batch.accumulation,
        "gradient_clipping": clipping_of(settings) or 0.0,
    }


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
