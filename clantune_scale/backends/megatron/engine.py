"""One member's Megatron-core model and optimizer behind the clan's protocol: hooks on them and no wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator
from megatron.core.utils import get_model_config, unwrap_model

from clantune_scale.backends.megatron import sharing, state, weights
from clantune_scale.backends.megatron.evaluation import ScheduledLoss
from clantune_scale.backends.megatron.rules import only_chunk, refuse_unsupported
from clantune_scale.backends.megatron.training_loss import TrainingLoss
from clantune_scale.config.default_genes import update_rule
from clantune_scale.core.line import DecayRule
from clantune_scale.errors import ClanError
from clantune_scale.gradients.hooks import GradientGroups, GradientSharing, evaluation_mode, replace_method
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.line.decays import decay_rule
from clantune_scale.transfer import MemberState


class MegatronBackend:
    """Megatron's ``DistributedDataParallel`` and optimizer, built in the member's world.

    Megatron's own schedule, gradient norm and update run unchanged. An optimizer step is one call of
    ``optimizer.step()``, whether it updates or is skipped because a scaled gradient is not finite. With a scheduler, a
    step that updates ends when ``scheduler.step()`` returns. So the state that is cloned or saved then is a complete
    step's.

    Args:
        model: Megatron's ``DistributedDataParallel``, or a list of one.
        optimizer: from ``get_megatron_optimizer``.
        scheduler: Megatron's ``OptimizerParamScheduler``, stepped after each update, or None.
        forward_step: the ``(data_iterator, model) -> (output, loss_func)`` that training gives to the schedule.
        seq_length: tokens of a sequence, as training gives it to the schedule.
        micro_batch_size: sequences per rank and backward pass.
        accumulation: micro-batches per optimizer step, to give to the schedule as ``num_microbatches``.

    Raises:
        ConfigError: for a setting that a clan cannot run with.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        scheduler: Any = None,
        *,
        forward_step: Callable[..., Any],
        seq_length: int,
        micro_batch_size: int,
        accumulation: int = 1,
    ) -> None:
        self.engine = only_chunk(model)
        self._config = get_model_config(self.engine)
        refuse_unsupported(self.engine, self._config, optimizer)
        self.module = unwrap_model(self.engine)
        self.micro_batch_size = micro_batch_size
        self.num_steps = 0
        self._optimizer, self._scheduler = optimizer, scheduler
        self._pp_group, self._tp_group = self.engine.pp_group, self.engine.tp_group
        self.dp_group = self.engine.dp_group
        self.pp_rank, self.pp_size = self._pp_group.rank(), self._pp_group.size()
        self.dp_rank, self.dp_size = self.dp_group.rank(), self.dp_group.size()
        self.tp_rank, self.tp_size = self._tp_group.rank(), self._tp_group.size()
        self.device = next(self.module.parameters()).device
        self._loss = ScheduledLoss(self.engine, self._pp_group, forward_step, seq_length)
        self._undo: list[Callable[[], None]] = []
        self._awaits_schedule = False
        self.accumulation = accumulation

    @property
    def clip(self) -> float:
        return float(self._optimizer.config.clip_grad)

    @clip.setter
    def clip(self, value: float) -> None:
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            part.config.clip_grad = value

    @property
    def accumulation(self) -> int:
        return self._accumulation

    @accumulation.setter
    def accumulation(self, value: int) -> None:
        self._accumulation = value
        # A loop that uses Megatron's calculator reads the number of micro-batches from it and not from the clan.
        if num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None:
            num_microbatches_calculator.reconfigure_num_microbatches_calculator(
                rank=dist.get_rank(),
                rampup_batch_size=None,
                global_batch_size=value * self.micro_batch_size * self.dp_size,
                micro_batch_size=self.micro_batch_size,
                data_parallel_size=self.dp_size,
            )

    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def masters(self) -> list[torch.Tensor]:
        return [master.detach() for master in state.masters(self._optimizer)]

    moves_with_weights = True

    has_inference_weights = False

    def inference_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def groups_of_masters(self) -> list[int]:
        return [index for index, group in enumerate(self.param_groups()) for _ in group["params"]]

    def in_update(self) -> list[bool]:
        return [True] * len(self.masters())

    def decay_rules(self) -> list[DecayRule | None]:
        inner = [(part.optimizer, group) for part in state.wrappers(self._optimizer) for group in part.param_groups]
        return [decay_rule(optimizer, group) for optimizer, group in inner]

    def validation_gradients(self) -> str:
        return "Megatron-core collects gradients in buffers of its own, which hold the loop's"

    def refresh(self) -> None:
        state.refresh(self.engine, self._optimizer)

    def state(self) -> MemberState:
        return state.member_state(self.engine, self.module, self._optimizer, self._scheduler)

    def share_gradients(
        self,
        team: Callable[[], tuple[int, ...]],
        groups: GradientGroups,
        probe: GradientProbe | None = None,
    ) -> None:
        """Hooks the reduction of gradients (see ``sharing``) and, for the probe, the norm before clipping."""
        probe = probe or GradientProbe()
        self._undo += sharing.share(self.engine, self._config, GradientSharing(team, groups, probe))
        self.show_norm(probe)

    def exchanging(self, is_last: bool) -> AbstractContextManager[None]:
        """Nothing: Megatron's schedule runs all micro-batches of a step in one call."""
        return nullcontext()

    # The number of micro-batches, the schedule's arguments and the scheduler's increment are the loop's.
    own_step = None

    # Skipped steps are counted.
    may_skip_steps = False

    def after_skip(self, callback: Callable[[], None]) -> None:
        """Does nothing: every step of the loop is counted."""

    def after_resize(self, num_members: int, callback: Callable[[int], None]) -> None:
        """Does nothing: Megatron's loop has no batch size but the clan's."""

    def settle(self) -> None:
        """Does nothing: a step ends in the engine's own call."""

    def after_load(self, callback: Callable[[], None]) -> None:
        """Refuses ``optimizer.load_state_dict``: Megatron loads a checkpoint in parts, and says at no point that it is
        whole."""

        def load_state_dict(*_: Any, **__: Any) -> None:
            raise ClanError(
                "a checkpoint is loaded into an optimizer that a clan is attached to, and the clan would go on from "
                "where it began. Load it before attach_megatron(), or resume the clan's own rounds (checkpoint.resume)."
            )

        self._undo.append(replace_method(self._optimizer, "load_state_dict", load_state_dict))

    def clear_gradients(self) -> None:
        self.engine.zero_grad_buffer()
        self._optimizer.zero_grad()

    def show_norm(self, probe: GradientProbe) -> None:
        step = self._optimizer.step

        def step_and_show(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if probe.is_active:
                # The norm is None in a skipped step, and if a single optimizer does not clip.
                probe.norm = None if result[1] is None else float(result[1])
            return result

        self._undo.append(replace_method(self._optimizer, "step", step_and_show))

    def around_update(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Hooks ``step_with_ready_grads``, which ``optimizer.step`` calls after clipping, and only if it updates."""
        update = self._optimizer.step_with_ready_grads

        def update_in_context() -> bool:
            with context():
                return update()

        self._undo.append(replace_method(self._optimizer, "step_with_ready_grads", update_in_context))

    def after_step(self, callback: Callable[[], None]) -> None:
        """Calls back after ``optimizer.step``, or after the scheduler's ``step`` if there is one and an update."""
        step = self._optimizer.step

        def call_back() -> None:
            self._awaits_schedule = False
            self.num_steps += 1
            callback()

        def step_then_call(*args: Any, **kwargs: Any) -> Any:
            self._require_schedule()
            result = step(*args, **kwargs)
            # Megatron's loops do not step the scheduler after a skipped step.
            if self._scheduler is None or not result[0]:
                call_back()
            else:
                self._awaits_schedule = True
            return result

        self._undo.append(replace_method(self._optimizer, "step", step_then_call))
        if self._scheduler is not None:
            self._undo.append(self._call_after_schedule(call_back))

    def _call_after_schedule(self, call_back: Callable[[], None]) -> Callable[[], None]:
        advance = self._scheduler.step

        def advance_then_call(*args: Any, **kwargs: Any) -> None:
            advance(*args, **kwargs)
            if self._awaits_schedule:
                call_back()

        return replace_method(self._scheduler, "step", advance_then_call)

    def _require_schedule(self) -> None:
        if self._awaits_schedule:
            raise ClanError(
                f"the scheduler's step() was not called after optimizer step {self.num_steps + 1}. Call it after each "
                f"optimizer.step() that updates, or leave the scheduler out of attach_megatron()."
            )

    def watch(self, on_batch: Callable[[tuple, dict], None], on_loss: Callable[[torch.Tensor], None]) -> None:
        """Hooks the first stage's forward pass, and the last stage's loss, which all stages get."""

        def before_forward(_: Any, args: tuple, kwargs: dict) -> None:
            if self.engine.training:
                on_batch(args, kwargs)

        # Later stages may get only masks and positions, which are equal in every batch.
        if self.pp_rank == 0:
            self._undo.append(self.engine.register_forward_pre_hook(before_forward, with_kwargs=True).remove)
        self._undo += TrainingLoss(self._config, self._pp_group, self.device, on_loss).hook()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients. On exit each submodule has the mode that it had before."""
        with evaluation_mode(self.engine):
            yield

    def batch_loss(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> torch.Tensor:
        """[] the loss of one batch by Megatron's forward-only schedule, or the last stage's loss of ``evaluate``."""
        return self._loss(batch, evaluate)

    def loss_scale(self) -> Mapping[str, Any] | None:
        return state.loss_scale(self._optimizer)

    def set_loss_scale(self, scale: Mapping[str, Any]) -> None:
        state.set_loss_scale(self._optimizer, scale)

    def optimizer_name(self) -> str:
        """The names of the inner optimizers and their wrappers. State of one kind does not fit another."""
        kinds = [(type(part).__name__, type(part.optimizer).__name__) for part in state.wrappers(self._optimizer)]
        return ", ".join(f"{inner} in {outer}" for outer, inner in kinds)

    def update_rule(self) -> str:
        """The one of all inner optimizers, or all their names: a clan's weight decay is of one kind or not tuned."""
        return " and ".join(sorted({update_rule(part.optimizer) for part in state.wrappers(self._optimizer)}))

    def counters(self) -> dict[str, int]:
        return {"num_steps": self.num_steps}

    def load_counters(self, counters: Mapping[str, int]) -> None:
        self.num_steps = counters["num_steps"]

    def random_streams(self) -> dict[str, torch.Tensor]:
        return state.random_streams()

    def load_random_streams(self, streams: Mapping[str, torch.Tensor]) -> None:
        state.load_random_streams(streams)

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        if self.engine.ddp_config.overlap_param_gather:
            # The next forward pass would gather the last update's weights. Gather them now.
            self.refresh()
        if self.dp_rank > 0:
            return None
        is_gated = bool(getattr(self._config, "gated_linear_unit", False))
        whole = weights.joined(self.module, self._tp_group, is_gated=is_gated)
        return whole if self.tp_rank == 0 else None

    def detach(self) -> None:
        while self._undo:
            self._undo.pop()()
