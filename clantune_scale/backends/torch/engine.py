"""The common part of FSDP2 and DDP members: a module and an optimizer in the user's own loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from clantune_scale.backends.torch import state
from clantune_scale.backends.torch.refusals import require_known_parameters, require_plain_step
from clantune_scale.config.default_genes import update_rule
from clantune_scale.data.watch import to_device
from clantune_scale.errors import ClanError, EvaluationError
from clantune_scale.gradients.clip import clip_grad_norm_, total_norm
from clantune_scale.gradients.hooks import GradientGroups, evaluation_mode, replace_method
from clantune_scale.gradients.posting_order import PostingOrder
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.validation_window import loss_of
from clantune_scale.transfer import MemberState

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class LoopBackend(ABC):
    """A member whose loop calls ``optimizer.step()`` itself. Subclasses for FSDP2 and DDP share the gradients.

    A step ends when the optimizer's last step hook has run. With a scheduler, it ends when the following
    ``scheduler.step()`` returns. So the state that is cloned or saved at the end of a round is a complete step's.

    Args:
        model: what the loop calls: the module, or the result of ``torch.compile``.
        module: the user's own module in it.
        optimizer: updates ``module``'s parameters.
        scheduler: stepped once after each optimizer step; None for no scheduler.
        micro_batch_size: samples per rank and backward pass.
        accumulation: micro-batches per optimizer step.
        gradient_clipping: gradient-norm threshold, 0 for none.

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
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        *,
        micro_batch_size: int,
        accumulation: int = 1,
        gradient_clipping: float = 0.0,
    ) -> None:
        self.engine, self.module = model, module
        self.micro_batch_size, self.accumulation, self.clip = micro_batch_size, accumulation, gradient_clipping
        self.num_steps = 0
        self._optimizer, self._scheduler = optimizer, scheduler
        named = [(_plain_name(name), parameter) for name, parameter in module.named_parameters()]
        require_known_parameters(optimizer, named)
        updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._trained = [(n, p) for n, p in named if id(p) in updated and p.requires_grad]
        self._frozen = [(n, p) for n, p in named if not (id(p) in updated and p.requires_grad)]
        self.device = state.local(named[0][1]).device
        self._undo: list[Callable[[], None]] = []
        self._probe, self._order = GradientProbe(), PostingOrder()
        self._is_clipped = False
        self._awaits_schedule = False

    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def masters(self) -> list[torch.Tensor]:
        return [state.local(parameter) for _, parameter in self._trained]

    def refresh(self) -> None:  # noqa: B027 - the default
        """Does nothing: the model computes with the masters."""

    def state(self) -> MemberState:
        fixed = self._frozen + [(_plain_name(name), buffer) for name, buffer in self.module.named_buffers()]
        return state.member_state(self._optimizer, self._trained, fixed, self._scheduler, self.refresh, self._starts)

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
        """Hooks the optimizer's update, after the user's clipping and before the scheduler's step."""
        entered = ExitStack()

        def before(_: Any, args: tuple, kwargs: dict) -> None:
            require_plain_step(args[1:], kwargs)
            self._require_schedule()
            # If the last update raised, torch did not call the post hook, and the context is still open.
            entered.close()
            self._before_update()
            entered.enter_context(context())

        def after(*_: Any) -> None:
            entered.close()
            self._is_clipped = False
            self._order.restart()

        self._undo += [
            entered.close,
            self._optimizer.register_step_pre_hook(before).remove,
            self._optimizer.register_step_post_hook(after).remove,
        ]

    def _before_update(self) -> None:
        if not self._is_clipped and (self.clip > 0 or self._probe.is_active):
            self.clip_gradients()
        self._check_order()

    def _check_order(self) -> None:  # noqa: B027 - the default
        """Compares the posting order of the clan's collectives over the ranks, in the first step and once per phase."""

    def after_step(self, callback: Callable[[], None]) -> None:
        """Calls back after the update. With a scheduler, it calls back when the scheduler's ``step`` returns."""

        def call_back() -> None:
            self._awaits_schedule = False
            self.num_steps += 1
            callback()

        def after_update(*_: Any) -> None:
            self._awaits_schedule = True
            if self._scheduler is None:
                call_back()

        self._undo.append(self._optimizer.register_step_post_hook(after_update).remove)
        if self._scheduler is None:
            return
        step = self._scheduler.step

        @wraps(step)
        def step_then_call(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if self._awaits_schedule:
                call_back()
            return result

        self._undo.append(replace_method(self._scheduler, "step", step_then_call))

    def _require_schedule(self) -> None:
        if self._awaits_schedule:
            raise ClanError(
                f"scheduler.step() was not called after optimizer step {self.num_steps + 1}. Call it once after each "
                f"optimizer.step(). If it is not stepped once per optimizer step, leave it out of attach()."
            )

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
                loss = _found_loss(output)
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
        if evaluate is not None:
            loss = loss_of(evaluate(self.engine, batch))
        else:
            batch = to_device(batch, self.device)
            if isinstance(batch, Mapping):
                loss = loss_of(self.engine(**batch))
            else:
                loss = loss_of(self.engine(*batch) if isinstance(batch, list | tuple) else self.engine(batch))
        loss = (loss.full_tensor() if isinstance(loss, DTensor) else loss).detach().to(self.device)
        if self.tp_group is not None:
            # All ranks decide by this number. Tensor ranks that sum in different orders could differ in the last bit.
            dist.broadcast(loss, group_src=0, group=self.tp_group)
        return loss

    def loss_scale(self) -> Mapping[str, Any] | None:
        return None

    def set_loss_scale(self, state: Mapping[str, Any]) -> None:
        raise ClanError(
            f"this loop does not scale the loss, so it cannot load the loss scale {dict(state)}. Train in bf16 or fp32."
        )

    def optimizer_name(self) -> str:
        return type(self._optimizer).__name__

    def update_rule(self) -> str:
        return update_rule(self._optimizer)

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
        is_first = dist.get_rank() == 0
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


def _found_loss(output: Any) -> torch.Tensor | None:
    """The loss in the output of a training forward pass; None if the output is something else (logits)."""
    try:
        return loss_of(output)
    except EvaluationError:
        return None


def _plain_name(name: str) -> str:
    """A parameter's name without the prefixes of compiled and activation-checkpointed modules."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
