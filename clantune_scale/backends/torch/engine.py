"""The common part of FSDP2 and DDP members: a module and an optimizer in the user's own loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from clantune_scale.backends.torch import state
from clantune_scale.backends.torch.between import Between, own_schedulers
from clantune_scale.backends.torch.hidden_state import refuse_unknown_optimizers
from clantune_scale.backends.torch.measured import MeasuredLoop
from clantune_scale.backends.torch.optimizers import Optimizers, StepEnd, after_call, schedulers_in
from clantune_scale.backends.torch.parameters import Parameters, plain_name
from clantune_scale.backends.torch.refusals import evaluate_closure, require_one_gradient, require_only_trained
from clantune_scale.backends.torch.scaler import ScaledLoop, require_known_scaler, with_scale
from clantune_scale.config.default_genes import update_rule
from clantune_scale.core.line import DecayRule
from clantune_scale.distributed.one_world import sum_over_world
from clantune_scale.gradients.clip import clip_grad_norm_, total_norm
from clantune_scale.gradients.hooks import GradientGroups
from clantune_scale.gradients.posting_order import PostingOrder
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.line.decays import decay_rule
from clantune_scale.runtime.validation_window import found_loss
from clantune_scale.transfer import MemberState


class LoopBackend(ScaledLoop, MeasuredLoop):
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
        is_line: whether members lie on a line.

    Raises:
        ConfigError: if the optimizer's parameters are not the module's, or members in groups have any in 16 bits.
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
        is_line: bool = False,
    ) -> None:
        self.engine, self.module = model, module
        self.micro_batch_size, self.accumulation, self.clip = micro_batch_size, accumulation, gradient_clipping
        self.num_steps = 0
        self._optimizers, self._schedulers = Optimizers(optimizer), schedulers_in(scheduler)
        require_one_gradient(self._optimizers.parts)
        self._parameters = Parameters(module, self._optimizers, takes_half=is_line)
        self.device = self._parameters.device
        self._undo: list[Callable[[], None]] = []
        self._probe, self._order = GradientProbe(), PostingOrder()
        self._is_clipped = False
        self._step_end: StepEnd | None = None
        super().__init__(scaler)
        self._has_looked_for_scaler = False
        self._between = Between()

    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizers.param_groups

    def masters(self) -> list[torch.Tensor]:
        return self._parameters.local()

    def groups_of_masters(self) -> list[int]:
        return self._parameters.groups()

    def in_update(self) -> list[bool]:
        return [parameter.grad is not None for _, parameter in self._parameters.trained]

    def decay_rules(self) -> list[DecayRule | None]:
        return [decay_rule(part, group) for part in self._optimizers.parts for group in part.param_groups]

    @property
    def moves_with_weights(self) -> bool:
        if not self._parameters.has_half:
            return not self._optimizers.has_modes
        stays = torch.tensor(float(self._optimizers.has_modes or self._parameters.have_masters()), device=self.device)
        sum_over_world(stays)  # a rank without any element would see no copy
        return not stays.item()

    @property
    def has_inference_weights(self) -> bool:
        return self._optimizers.has_modes

    def inference_weights(self) -> AbstractContextManager[None]:
        """Inside, the model holds the weights that its optimizers want to be evaluated and saved."""
        return self._optimizers.inference_weights()

    # How a plain loop makes gradients of the model's outputs cannot be seen.
    own_step = None

    def clear_gradients(self) -> None:
        self._optimizers.zero_grad()

    def show_norm(self, probe: GradientProbe) -> None:
        self._probe = probe

    def refresh(self) -> None:
        """Does nothing: the model computes with the masters."""

    def state(self) -> MemberState:
        self._optimizers.require_known_keys()
        known, schedulers = self._parameters, [*self._schedulers, *self._between.schedulers]
        fixed = known.fixed + known.buffers()
        found = state.member_state(self._optimizers, known.trained, fixed, schedulers, self.refresh, self._starts)
        if self._scaler is not None:
            with_scale(found, self.loss_scale, self.set_loss_scale)
        found.grow = lambda names: self._optimizers.grow(
            [parameter for _, parameter in known.trained], state.grown_indices(names)
        )
        found.reread = self.state
        return found

    def _starts(self) -> Mapping[str, int] | None:
        """By parameter, the first element that this rank's shard holds; left out for 0."""
        return {}

    @abstractmethod
    def exchanging(self, is_last: bool) -> AbstractContextManager[None]:
        """The context of one micro-batch's forward and backward. Gradients cross ranks in the step's last one only."""

    def clip_gradients(self) -> torch.Tensor:
        """[] the member's gradient norm before clipping. It clips to the present threshold, once per step."""
        trained = [parameter for _, parameter in self._parameters.trained]
        if self._is_clipped:
            return total_norm(trained)
        norm = clip_grad_norm_(trained, self.clip)
        self.note_clipping(norm)
        return norm

    def note_clipping(self, norm: torch.Tensor) -> None:
        """Says that the loop has clipped this step's gradients, whose norm was ``norm``: the clan does not."""
        self._is_clipped = True
        if self._probe.is_active:
            self._probe.norm = float(norm)

    def around_update(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Hooks each optimizer's update, after the user's clipping and before the scheduler's step."""
        self._undo.append(refuse_unknown_optimizers(self._optimizers.parts, self.module))
        for index, part in enumerate(self._optimizers.parts):
            self._around_part(index, part, context)

    def _around_part(
        self, index: int, part: torch.optim.Optimizer, context: Callable[[], AbstractContextManager[None]]
    ) -> None:
        entered, num_groups = ExitStack(), len(part.param_groups)

        def before(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            known = self._parameters
            require_only_trained(part.param_groups, known.trained_ids, known.names, num_groups=num_groups)
            if not self._has_looked_for_scaler:
                self._has_looked_for_scaler = True
                require_known_scaler(self._optimizers.parts, self._scaler)
            if self._step_end is not None:
                self._step_end.require_turn(index, self.num_steps)
            given = evaluate_closure(part, args, kwargs)
            # If the last update raised, torch did not call the post hook, and the context is still open.
            entered.close()
            self._before_update()
            entered.enter_context(context())
            return given

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

    def _check_order(self) -> None:
        """Compares the posting order of the clan's collectives over the ranks, in the first step and once per phase."""

    def after_step(self, callback: Callable[[], None]) -> None:
        """Calls back after the update; after the ``step`` of schedulers and the ``update`` of a scaler if there are."""

        def call_back() -> None:
            if not self.num_steps:
                self.state()  # the optimizer has made its state: what could not be copied is refused now
            self.num_steps += 1
            self._is_clipped = False
            self._order.end_step()
            if not self._between.has_stepped:
                self._between.has_stepped = True
                # Some loops make their schedulers after attach().
                self._between.schedulers = own_schedulers(parts, schedulers)
            self._between.end_step(callback)

        parts, schedulers = self._optimizers.parts, self._schedulers
        self._between.schedulers = own_schedulers(parts, schedulers)
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

    def after_resize(self, num_members: int, callback: Callable[[int], None]) -> None:
        """Does nothing: a loop has no batch size but the clan's."""

    def after_load(self, callback: Callable[[], None]) -> None:
        """Calls back at the first training forward pass after the module or an optimizer loaded a state."""
        self._undo += self._between.watch(self.engine, self.module, self._optimizers.parts, callback)

    def settle(self) -> None:
        self._between.settle()

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

    def load_random_streams(self, streams: Mapping[str, torch.Tensor]) -> None:
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
        wanted = {plain_name(name) for name in self.module.state_dict()}
        known = self._parameters
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        weights: dict[str, torch.Tensor] = {}
        for name, tensor in known.all + [(n, b) for n, b in known.buffers() if n in wanted]:
            with torch.no_grad():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if is_first:
                weights[name] = whole.detach().to("cpu", copy=True).contiguous()
        return weights if is_first else None

    def detach(self) -> None:
        while self._undo:
            self._undo.pop()()
