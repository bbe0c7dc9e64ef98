"""The common part of FSDP2 and DDP members: a module and an optimizer in the user's own loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from clantune_scale.backends.torch import state
from clantune_scale.backends.torch.optimizers import Optimizers, StepEnd, after_call, schedulers_in
from clantune_scale.backends.torch.refusals import require_known_parameters, require_plain_step
from clantune_scale.backends.torch.scaler import require_known_scaler, scale_of, set_scale, with_scale
from clantune_scale.config.default_genes import update_rule
from clantune_scale.core.line import DecayRule
from clantune_scale.data.watch import to_device
from clantune_scale.errors import ClanError
from clantune_scale.gradients.clip import clip_grad_norm_, total_norm
from clantune_scale.gradients.hooks import GradientGroups, evaluation_mode
from clantune_scale.gradients.posting_order import PostingOrder
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.engine_protocol import ValidationGradients
from clantune_scale.runtime.line.decays import decay_rule
from clantune_scale.runtime.validation_window import found_loss, loss_of
from clantune_scale.transfer import MemberState

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class LoopBackend(ABC):
    """A member whose loop calls ``optimizer.step()`` itself. Subclasses for FSDP2 and DDP share the gradients.

    A step ends when the optimizer's last step hook has run. With a scheduler, it ends when the following
    ``scheduler.step()`` returns. So the state that is cloned or saved at the end of a round is a complete step's.

    Args:
        model: what the loop calls: the module, or the result of ``torch.compile``.
        module: the user's own module in it.
        optimizer: updates ``module``'s parameters; a list or a container if there are several.
        scheduler: stepped once after each optimizer step; a list if there are several, None if there is none.
        micro_batch_size: samples per rank and backward pass.
        accumulation: micro-batches per optimizer step.
        gradient_clipping: gradient-norm threshold, 0 for none.
        scaler: by which the loop scales the loss and takes its steps; None if it does not.

    Raises:
        ConfigError: if the optimizer's parameters are not the module's, or not in float32.
    """

    pp_rank = 0
    pp_size = 1
    # Set by the subclasses, which know the model's meshes and groups.
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    dp_group: Any
    tp_group: Any = None

    def __init__(
        self,
        model: torch.nn.Module,
        module: torch.nn.Module,
        optimizer: Any,
        scheduler: Any = None,
        *,
        micro_batch_size: int,
        accumulation: int = 1,
        gradient_clipping: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.engine, self.module = model, module
        self.micro_batch_size, self.accumulation, self.clip = micro_batch_size, accumulation, gradient_clipping
        self.num_steps = 0
        self._optimizers, self._schedulers = Optimizers(optimizer), schedulers_in(scheduler)
        named = [(_plain_name(name), parameter) for name, parameter in module.named_parameters()]
        require_known_parameters(self._optimizers.param_groups, named)
        updated = {id(parameter) for group in self._optimizers.param_groups for parameter in group["params"]}
        self._trained = [(n, p) for n, p in named if id(p) in updated and p.requires_grad]
        self._frozen = [(n, p) for n, p in named if not (id(p) in updated and p.requires_grad)]
        self.device = state.local(named[0][1]).device
        self._undo: list[Callable[[], None]] = []
        self._probe, self._order = GradientProbe(), PostingOrder()
        self._is_clipped = False
        self._step_end: StepEnd | None = None
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._has_looked_for_scaler = self._has_stepped = False
        self._on_skip: Callable[[], None] | None = None

    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizers.param_groups

    def masters(self) -> list[torch.Tensor]:
        return [state.local(parameter) for _, parameter in self._trained]

    def groups_of_masters(self) -> list[int]:
        places = {id(p): index for index, group in enumerate(self.param_groups()) for p in group["params"]}
        return [places[id(parameter)] for _, parameter in self._trained]

    def decay_rules(self) -> list[DecayRule | None]:
        return [decay_rule(part, group) for part in self._optimizers.parts for group in part.param_groups]

    @property
    def moves_with_weights(self) -> bool:
        """Whether weights may be moved while the optimizer's state stays: no copy of them is in it."""
        return not self._optimizers.has_modes

    def inference_weights(self) -> AbstractContextManager[None]:
        """Inside, the model holds the weights that its optimizers want to be evaluated and saved."""
        return self._optimizers.inference_weights()

    # How a plain loop makes gradients of the model's outputs cannot be seen.
    own_step = None

    def clear_gradients(self) -> None:
        self._optimizers.zero_grad()

    def show_norm(self, probe: GradientProbe) -> None:
        self._probe = probe

    def refresh(self) -> None:  # noqa: B027 - the default
        """Does nothing: the model computes with the masters."""

    def state(self) -> MemberState:
        fixed = self._frozen + [(_plain_name(name), buffer) for name, buffer in self.module.named_buffers()]
        found = state.member_state(self._optimizers, self._trained, fixed, self._schedulers, self.refresh, self._starts)
        if self._scaler is not None:
            with_scale(found, self.loss_scale, self.set_loss_scale)
        found.grow = lambda names: self._optimizers.grow(
            [parameter for _, parameter in self._trained], state.grown_indices(names)
        )
        return found

    def _starts(self) -> Mapping[str, int] | None:
        """By parameter, the first element that this rank's shard holds; left out for 0."""
        return {}

    @abstractmethod
    def exchanging(self, is_last: bool) -> AbstractContextManager[None]:
        """The context of one micro-batch's forward and backward. Gradients cross ranks in the step's last one only."""

    def clip_gradients(self) -> torch.Tensor:
        """[] the member's gradient norm before clipping. It clips to the present threshold, once per step."""
        if self._is_clipped:
            return total_norm(parameter for _, parameter in self._trained)
        norm = clip_grad_norm_([parameter for _, parameter in self._trained], self.clip)
        self._is_clipped = True
        if self._probe.is_active:
            self._probe.norm = float(norm)
        return norm

    def around_update(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Hooks each optimizer's update, after the user's clipping and before the scheduler's step."""
        for index, part in enumerate(self._optimizers.parts):
            self._around_part(index, part, context)

    def _around_part(
        self, index: int, part: torch.optim.Optimizer, context: Callable[[], AbstractContextManager[None]]
    ) -> None:
        entered = ExitStack()

        def before(_: Any, args: tuple, kwargs: dict) -> None:
            require_plain_step(args[1:], kwargs)
            if not self._has_looked_for_scaler:
                self._has_looked_for_scaler = True
                require_known_scaler(self._optimizers.parts, self._scaler)
            if self._step_end is not None:
                self._step_end.require_turn(index, self.num_steps)
            # If the last update raised, torch did not call the post hook, and the context is still open.
            entered.close()
            self._before_update()
            entered.enter_context(context())

        def after(*_: Any) -> None:
            entered.close()
            self._has_stepped = True

        self._undo += [
            entered.close,
            part.register_step_pre_hook(before).remove,
            part.register_step_post_hook(after).remove,
        ]

    def _before_update(self) -> None:
        if not self._is_clipped and (self.clip > 0 or self._probe.is_active):
            self.clip_gradients()
        self._check_order()

    def _check_order(self) -> None:  # noqa: B027 - the default
        """Compares the posting order of the clan's collectives over the ranks, in the first step and once per phase."""

    def after_step(self, callback: Callable[[], None]) -> None:
        """Calls back after the update; after the ``step`` of schedulers and the ``update`` of a scaler if there are."""

        def call_back() -> None:
            self.num_steps += 1
            self._is_clipped = False
            self._order.restart()
            callback()

        parts, schedulers = self._optimizers.parts, self._schedulers
        num_closing = len(schedulers) + (self._scaler is not None)
        self._step_end = end = StepEnd(len(parts), num_closing, call_back)
        for index, part in enumerate(parts):
            self._undo.append(
                part.register_step_post_hook(lambda *_, index=index: end.stepped("optimizer", index)).remove
            )
        for index, scheduler in enumerate(schedulers):
            self._undo.append(after_call(scheduler, "step", partial(end.stepped, "scheduler", index)))
        if self._scaler is not None:
            # In this order: what ends the step may take steps of its own.
            self._undo.append(after_call(self._scaler, "update", self._note_scaling))
            self._undo.append(after_call(self._scaler, "update", partial(end.stepped, "scheduler", len(schedulers))))

    def after_skip(self, callback: Callable[[], None]) -> None:
        """Calls back when the loop's scaler has skipped a step: its ``update`` comes, and no optimizer has stepped."""
        self._on_skip = callback

    def _note_scaling(self) -> None:
        """A step ends only after the scaler's ``update``, which is the last to change its state."""
        if not self._has_stepped and self._on_skip is not None:
            self._on_skip()
        self._has_stepped = False

    def _require_schedule(self) -> None:
        if self._step_end is not None and self._step_end.awaits_schedulers:
            self._step_end.require_turn(0, self.num_steps)

    def watch(self, on_batch: Callable[[tuple, dict], None], on_loss: Callable[[torch.Tensor], None]) -> None:
        """Hooks the model's training forward pass: its arguments, and the loss if it returns one."""

        # torch.compile must not trace the hooks: they are not part of the model.
        @torch.compiler.disable
        def before_forward(_: Any, args: tuple, kwargs: dict) -> None:
            if self.engine.training:
                self._require_schedule()
                on_batch(args, kwargs)

        @torch.compiler.disable
        def after_forward(_: Any, args: Any, output: Any) -> None:
            if self.engine.training:
                loss = found_loss(output)
                if loss is not None:
                    on_loss(loss)

        self._undo.append(self.engine.register_forward_pre_hook(before_forward, with_kwargs=True).remove)
        self._undo.append(self.engine.register_forward_hook(after_forward).remove)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients. On exit each submodule has the mode that it had before."""
        try:
            with evaluation_mode(self.engine):
                yield
        finally:
            self.refresh()

    def batch_loss(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> torch.Tensor:
        """[] the loss on one batch: a mapping is passed by keyword, a sequence by position, anything else as it is."""
        loss = self._loss(batch, evaluate)
        loss = (loss.full_tensor() if isinstance(loss, DTensor) else loss).detach().to(self.device)
        if self.tp_group is not None:
            # All ranks decide by this number. Tensor ranks that sum in different orders could differ in the last bit.
            dist.broadcast(loss, group_src=0, group=self.tp_group)
        return loss

    def _loss(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> torch.Tensor:
        if evaluate is not None:
            return loss_of(evaluate(self.engine, batch))
        batch = to_device(batch, self.device)
        if isinstance(batch, Mapping):
            return loss_of(self.engine(**batch))
        return loss_of(self.engine(*batch) if isinstance(batch, list | tuple) else self.engine(batch))

    @abstractmethod
    def validation_gradients(self) -> ValidationGradients | str:
        """Gives gradients of validation losses; or says why this engine cannot."""

    @property
    def may_skip_steps(self) -> bool:
        """Whether a step of the loop may update nothing, because scaled gradients overflowed."""
        return self._scaler is not None

    def loss_scale(self) -> Mapping[str, Any] | None:
        return None if self._scaler is None else scale_of(self._scaler)

    def set_loss_scale(self, state: Mapping[str, Any]) -> None:
        if self._scaler is None:
            raise ClanError(
                f"this loop does not scale the loss, so it cannot load the loss scale {dict(state)}. Train in bf16 or "
                f"fp32, or pass scaler=... to attach()."
            )
        set_scale(self._scaler, state)

    def optimizer_name(self) -> str:
        return self._optimizers.name

    def update_rule(self) -> str:
        """The one of all optimizers, or all their names: a clan's weight decay is of one kind or not tuned."""
        return " and ".join(sorted({update_rule(part) for part in self._optimizers.parts}))

    def counters(self) -> dict[str, int]:
        return {"num_steps": self.num_steps}

    def load_counters(self, counters: Mapping[str, int]) -> None:
        self.num_steps = counters["num_steps"]

    def random_streams(self) -> dict[str, torch.Tensor]:
        return {}

    def load_random_streams(self, streams: Mapping[str, torch.Tensor]) -> None:  # noqa: B027 - the default
        """Does nothing: PyTorch's parallelism draws from torch's own streams only."""

    @abstractmethod
    def share_gradients(
        self,
        team: Callable[[], tuple[int, ...]],
        groups: GradientGroups,
        probe: GradientProbe | None = None,
    ) -> None:
        """See :class:`~clantune_scale.runtime.engine_protocol.SharesGrads`."""

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """Weights and persistent buffers in host memory on the member's first rank, gathered one by one."""
        wanted = {_plain_name(name) for name in self.module.state_dict()}
        buffers = [(_plain_name(name), buffer) for name, buffer in self.module.named_buffers()]
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        weights: dict[str, torch.Tensor] = {}
        for name, tensor in self._trained + self._frozen + [(n, b) for n, b in buffers if n in wanted]:
            with torch.no_grad():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if is_first:
                weights[name] = whole.detach().to("cpu", copy=True).contiguous()
        return weights if is_first else None

    def detach(self) -> None:
        while self._undo:
            self._undo.pop()()


def _plain_name(name: str) -> str:
    """A parameter's name without the prefixes of compiled and activation-checkpointed modules."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
