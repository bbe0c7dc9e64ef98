"""A clan in a loop by Hugging Face Accelerate: ``clan = attach(accelerator, model, optimizer, scheduler, ...)``."""

from __future__ import annotations

from clantune_scale.core.extras import is_installed, missing

if not is_installed("accelerate"):
    raise missing("accelerate", needed_by="clantune_scale.integrations.accelerate")

from collections.abc import Callable, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from typing_extensions import Unpack

from clantune_scale.backends.torch.attach import attach as attach_to_loop
from clantune_scale.backends.torch.loop_clan import LoopClan
from clantune_scale.config.batch import clipping_of
from clantune_scale.config.deepspeed_file import load_config, require_block
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.gradients.hooks import replace_method
from clantune_scale.integrations.common import block_in_loop, figures, load, require_plain_batch, save
from clantune_scale.runtime.arguments import LoopArguments, shares
from clantune_scale.runtime.line.refusals import may_compete
from clantune_scale.runtime.validation_window import found_loss, loss_of

#: Kinds of training that were looked at: one device, DDP on any of them, FSDP2, DeepSpeed.
_KNOWN = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_XPU", "MULTI_HPU", "FSDP", "DEEPSPEED")


@shares(LoopArguments)
def attach(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    scheduler: Any = None,
    *,
    gradient_clipping: float | None = None,
    **arguments: Unpack[LoopArguments],
) -> LoopClan:
    """Attaches a clan on the line to what ``accelerator.prepare()`` returned. The loop stays as it is::

        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        clan = attach(accelerator, model, optimizer, scheduler, config=config, eval_data=validation)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        clan.finish()

    Members take their turns by the same calls, on batches that the loop has drawn: the loss that the model returned,
    ``accelerator.backward``, the clipping by ``accelerator`` that the loop's last step had, the optimizer, the
    scheduler. A loop with a loss function of its own passes ``train_step``. ``accelerator.save_state()`` saves the clan
    too, and ``accelerator.load_state()``, called after this, loads it. Trackers of the accelerator get the figures of
    each round.

    Args:
        accelerator: that prepared the rest.
        model: as ``prepare()`` returned it.
        optimizer: likewise.
        scheduler: stepped once after each optimizer step; None if there is none, or it moves otherwise.
        gradient_clipping: threshold of the loop's ``accelerator.clip_grad_norm_``, for a gene ``clip``; the clan clips
            by it if the loop does not clip. None takes the config's, else 0.
        {arguments}

    Returns:
        The clan. Call its ``finish()`` after the loop.

    Raises:
        ConfigError: if the block or the accelerator's kind of training cannot be used.
        ClanError: if training has begun, or its state was loaded.
    """
    _refuse(accelerator, model, optimizer)
    settings, found = load_config(arguments["config"])
    project = accelerator.project_dir
    block = block_in_loop(
        require_block(found),
        loop="Accelerate's loop",
        resume="call accelerator.load_state() after attach()",
        directory=None if project is None else Path(project),
    )
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    loop = _Loop(accelerator, model, optimizer, scheduler)
    own_step = arguments.get("train_step")
    if gradient_clipping is None:
        gradient_clipping = clipping_of(settings) or 0.0
    # What the accelerator knows is not taken from the config, where DeepSpeed lets it be "auto".
    keywords: dict[str, Any] = {
        **arguments,
        "config": block,
        "micro_batch_size": arguments.get("micro_batch_size") or _micro_batch(accelerator),
        "num_samples": arguments.get("num_samples") or _num_samples(accelerator),
        "train_step": own_step or loop.train_step,
        "watch": arguments.get("watch") or loop.watch,
    }
    clan = attach_to_loop(
        model,
        None if is_deepspeed else optimizer,
        None if isinstance(scheduler, DeepSpeedSchedulerWrapper) else scheduler,
        accumulation=accelerator.gradient_accumulation_steps,
        gradient_clipping=gradient_clipping,
        scaler=accelerator.scaler,
        **keywords,
    )
    loop.follow(clan, is_loss_known=own_step is None and arguments.get("watch") is None)
    return clan


def show_clipping(accelerator: Accelerator, clan: LoopClan) -> Callable[[], None]:
    """Lets ``accelerator.clip_grad_norm_`` clip at the gene's threshold if there is one, and tells the clan of it.

    Returns:
        What undoes that.
    """
    clip = accelerator.clip_grad_norm_
    is_gene = any(gene.target == "clip" for gene in clan.genes)

    def clip_and_tell(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        norm = clip(parameters, clan.backend.clip if is_gene else max_norm, *args, **kwargs)
        if accelerator.distributed_type != DistributedType.DEEPSPEED and norm is not None:
            clan.backend.note_clipping(norm)
        return norm

    return replace_method(accelerator, "clip_grad_norm_", clip_and_tell)


class _Loop:
    """The user's loop as the clan sees it: what it calls for a step, and how to do one step more."""

    def __init__(self, accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any) -> None:
        self._accelerator, self._model, self._optimizer, self._scheduler = accelerator, model, optimizer, scheduler
        self._clan: LoopClan | None = None
        self._is_loss_known = False
        self._returned: torch.Tensor | None = None
        # By method of the accelerator, the arguments with which the loop clipped in its last step.
        self._clips: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._num_rounds = 0
        self._loaded: Path | None = None

    def follow(self, clan: LoopClan, *, is_loss_known: bool) -> None:
        """Begins once the clan is there: clipping, checkpoints, figures."""
        self._clan, accelerator = clan, self._accelerator
        self._is_loss_known = is_loss_known and may_compete(clan.strategy)
        undo = [show_clipping(accelerator, clan)]
        undo += [self._note_clips(name) for name in ("clip_grad_norm_", "clip_grad_value_")]
        undo.append(accelerator.register_save_state_pre_hook(lambda _, __, folder: save(clan, Path(folder))).remove)
        undo.append(accelerator.register_load_state_pre_hook(self._note_folder).remove)
        load_state = accelerator.load_state

        def load_state_and_clan(*args: Any, **kwargs: Any) -> Any:
            result = load_state(*args, **kwargs)
            assert self._loaded is not None, "accelerate calls its hooks before it loads"
            load(clan, self._loaded)
            self._num_rounds = len(clan.progress.lineage)
            return result

        undo.append(replace_method(accelerator, "load_state", load_state_and_clan))
        detach = clan.detach

        def detach_all() -> None:
            while undo:
                undo.pop()()
            detach()
            self._report()

        replace_method(clan, "detach", detach_all)

    def watch(self, on_batch: Callable[[Any, Any], None], on_loss: Callable[[Any], None]) -> Callable[[], None]:
        """Shows the clan the arguments of training forward passes, and the losses that go backward."""
        model, accelerator = self._model, self._accelerator
        # DeepSpeed's engine passes a mode on and does not take it over.
        module = getattr(model, "module", model)
        backward = accelerator.backward
        has_seen = False

        @torch.compiler.disable
        def before_forward(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal has_seen
            if module.training:
                if not has_seen and self._is_loss_known:
                    require_plain_batch([list(args), kwargs])
                has_seen = True
                on_batch(args, kwargs)

        @torch.compiler.disable
        def after_forward(_: Any, __: Any, output: Any) -> None:
            if module.training:
                self._returned = found_loss(output)

        def backward_watched(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._is_loss_known and loss is not self._returned:
                raise ConfigError(
                    "accelerator.backward() got another loss than the model returned, and members take turns in a "
                    "competitive phase, which cannot be repeated without it. Let the model return its loss; or pass "
                    'train_step=... to attach(); or leave the competition out: "strategy": {"name": "clan", '
                    '"options": {"trial_cost": 0}}.'
                )
            self._returned = None
            on_loss(loss)
            self._report()
            return backward(loss, *args, **kwargs)

        undo = [
            model.register_forward_pre_hook(before_forward, with_kwargs=True).remove,
            model.register_forward_hook(after_forward).remove,
            replace_method(accelerator, "backward", backward_watched),
        ]

        def unwatch() -> None:
            while undo:
                undo.pop()()

        return unwatch

    def train_step(self, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """One optimizer step by the calls of the loop, on the arguments of forward passes."""
        accelerator, model = self._accelerator, self._model
        state = accelerator.gradient_state
        before = state.sync_gradients
        for number, (args, kwargs) in enumerate(calls):
            is_last = number == len(calls) - 1
            state._set_sync_gradients(is_last)
            with nullcontext() if is_last else accelerator.no_sync(model):
                accelerator.backward(loss_of(model(*args, **kwargs)))
        for name, (arguments, keywords) in list(self._clips.items()):
            getattr(accelerator, name)(*arguments, **keywords)
        self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        self._optimizer.zero_grad()
        state._set_sync_gradients(before)

    def _note_clips(self, name: str) -> Callable[[], None]:
        clip = getattr(self._accelerator, name)

        def clip_and_note(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            self._clips[name] = ((parameters, *args), kwargs)
            return clip(parameters, *args, **kwargs)

        return replace_method(self._accelerator, name, clip_and_note)

    def _note_folder(self, _: Any, folder: str) -> None:
        self._loaded = Path(folder)

    def _report(self) -> None:
        """Gives the accelerator's trackers the figures of a round that has ended."""
        clan = self._clan
        if clan is None or len(clan.progress.lineage) == self._num_rounds:
            return
        self._num_rounds = len(clan.progress.lineage)
        if self._accelerator.trackers:
            self._accelerator.log(figures(clan), step=clan.num_steps)


def _refuse(accelerator: Accelerator, model: Any, optimizer: Any) -> None:
    """What cannot be used, before a hook is set."""
    kind = accelerator.distributed_type
    if kind.value not in _KNOWN:
        raise ConfigError(
            f"the accelerator trains by {kind.value}, with which a clan was not tried. Use one device, DDP, FSDP2 or "
            f"DeepSpeed."
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("the accelerator uses FSDP1, which a clan does not know. Set fsdp_version to 2.")
    if not any(model is one for one in accelerator._models):
        raise ConfigError("the model was not prepared. Pass attach() what accelerator.prepare() returned.")
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise ConfigError("the optimizer was not prepared. Pass attach() what accelerator.prepare() returned.")
    is_deepspeed = kind == DistributedType.DEEPSPEED
    has_begun = model.global_steps > 0 if is_deepspeed else any(optimizer.state.values())
    if has_begun:
        raise ClanError(
            "the optimizer has taken steps, or a state was loaded into it, before the clan was attached, so that the "
            "clan's own state is not loaded with it. Call attach() right after accelerator.prepare(), and "
            "accelerator.load_state() after attach()."
        )


def _micro_batch(accelerator: Accelerator) -> int:
    loaders = [one for one in accelerator._dataloaders if getattr(one, "total_batch_size", None)]
    if not loaders:
        raise ConfigError(
            "attach() does not know the batch. Prepare the training loader first, or pass micro_batch_size=..."
        )
    return max(1, int(loaders[0].total_batch_size) // accelerator.num_processes)


def _num_samples(accelerator: Accelerator) -> int | None:
    data = next((one.dataset for one in accelerator._dataloaders), None)
    return len(data) if isinstance(data, Sized) else None
