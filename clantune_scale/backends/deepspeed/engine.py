"""One member's DeepSpeed engine behind the clan's protocol: hooks on the engine, no wrapper around it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import deepspeed
import torch

from clantune_scale.backends.deepspeed import sharing, weights
from clantune_scale.backends.deepspeed import state as training_state
from clantune_scale.backends.deepspeed.batch_size import hook_batch_size
from clantune_scale.backends.deepspeed.loop_scheduler import call_after_step, with_scheduler
from clantune_scale.backends.deepspeed.place import MemberCoordinates, place_of
from clantune_scale.backends.deepspeed.refusals import refuse_unsupported
from clantune_scale.backends.torch.optimizers import has_modes
from clantune_scale.config.deepspeed_limits import NO_VALIDATION_GRADIENTS
from clantune_scale.config.default_genes import update_rule
from clantune_scale.core.line import DecayRule
from clantune_scale.data.containers import call_on, to_device
from clantune_scale.gradients.hooks import GradientGroups, GradientSharing, replace_method
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.line.decays import decay_rule
from clantune_scale.runtime.validation_window import found_loss, loss_of
from clantune_scale.transfer import MemberState


def suppress_start_up_noise() -> None:
    """Stops DeepSpeed from compiling an extension and from warning about its own calls. Call it before it starts."""
    # These shared-memory collectives for the CPU need a C++ compiler and take 20 s at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls names that torch 2.13 deprecates. A user cannot change that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


class DeepSpeedBackend:
    """A ``DeepSpeedEngine`` that sees the member as its world.

    Args:
        engine: what ``deepspeed.initialize`` returned.
        scheduler: that the loop steps after each step of the engine; None if there is none, or it is the engine's own.

    Raises:
        ConfigError: for a DeepSpeed setting that a clan cannot run with.
    """

    def __init__(self, engine: Any, scheduler: Any = None) -> None:
        self.engine = engine
        self._scheduler = None if scheduler is engine.lr_scheduler else scheduler
        self._undo: list[Callable[[], None]] = []
        # Whether the loop makes its loss of the model's outputs by itself.
        self._has_foreign_loss = False
        refuse_unsupported(engine)
        training_state.note_trained(engine)

    @cached_property
    def place(self) -> MemberCoordinates:
        """This rank's coordinates in the member."""
        return place_of(self.engine)

    @property
    def pp_rank(self) -> int:
        return self.place.pp_rank

    @property
    def pp_size(self) -> int:
        return self.place.pp_size

    @property
    def tp_rank(self) -> int:
        return self.place.tp_rank

    @property
    def tp_size(self) -> int:
        return self.place.tp_size

    @property
    def module(self) -> torch.nn.Module:
        return self.engine.module

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    @property
    def dp_rank(self) -> int:
        return self.place.dp_rank

    @property
    def dp_size(self) -> int:
        return self.engine.dp_world_size

    @property
    def dp_group(self) -> Any:
        return self.engine.data_parallel_group

    @property
    def micro_batch_size(self) -> int:
        return self.engine.train_micro_batch_size_per_gpu()

    @property
    def num_steps(self) -> int:
        return self.engine.global_steps

    @property
    def clip(self) -> float:
        return float(self.engine.gradient_clipping())

    @clip.setter
    def clip(self, value: float) -> None:
        # ZeRO 0 in fp32 reads the config. Every wrapped optimizer reads a copy of its own.
        self.engine._config.gradient_clipping = value
        if hasattr(self.engine.optimizer, "clip_grad"):
            self.engine.optimizer.clip_grad = value

    @property
    def accumulation(self) -> int:
        return self.engine.gradient_accumulation_steps()

    @accumulation.setter
    def accumulation(self, value: int) -> None:
        # The class's method: the instance's is the script's way to change the batch size.
        type(self.engine).set_train_batch_size(self.engine, value * self.micro_batch_size * self.dp_size)
        # DeepSpeed's step boundary is micro_steps modulo the accumulation. Without the reset it would shift.
        self.engine.micro_steps = 0
        if hasattr(self.engine.optimizer, "gradient_accumulation_steps"):
            self.engine.optimizer.gradient_accumulation_steps = value

    def param_groups(self) -> list[dict[str, Any]]:
        return self.engine.basic_optimizer.param_groups

    def masters(self) -> list[torch.Tensor]:
        return training_state.masters(self.engine)

    @property
    def moves_with_weights(self) -> bool:
        return not has_modes(self.engine.basic_optimizer)

    @property
    def has_inference_weights(self) -> bool:
        return has_modes(self.engine.basic_optimizer)

    def inference_weights(self) -> AbstractContextManager[None]:
        return training_state.inference_weights(self.engine)

    def groups_of_masters(self) -> list[int]:
        return training_state.groups_of_masters(self.engine)

    def in_update(self) -> list[bool]:
        return training_state.in_update(self.engine)

    def decay_rules(self) -> list[DecayRule | None]:
        inner = self.engine.basic_optimizer
        return [decay_rule(inner, group) for group in inner.param_groups]

    def validation_gradients(self) -> str:
        return NO_VALIDATION_GRADIENTS

    def refresh(self) -> None:
        training_state.refresh(self.engine)

    def state(self) -> MemberState:
        state = training_state.member_state(self.engine)
        return state if self._scheduler is None else with_scheduler(state, self._scheduler, self.param_groups)

    def share_gradients(
        self,
        team: Callable[[], tuple[int, ...]],
        groups: GradientGroups,
        probe: GradientProbe | None = None,
    ) -> None:
        """Hooks the reduction of gradients (see ``sharing``) and, for the probe, the norm before clipping."""
        probe = probe or GradientProbe()
        self._undo += sharing.share(self.engine, GradientSharing(team, groups, probe))
        self.show_norm(probe)

    def exchanging(self, is_last: bool) -> AbstractContextManager[None]:
        """Nothing: DeepSpeed counts micro-batches itself."""
        return nullcontext()

    @property
    def own_step(self) -> Callable[[list[tuple[tuple[Any, ...], dict[str, Any]]]], object] | None:
        """One optimizer step, if the loop gives to ``engine.backward`` just what the model returned as its loss."""
        return None if self._has_foreign_loss else self._train_step

    def _train_step(self, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        for args, kwargs in calls:
            self.engine.backward(loss_of(self.engine(*args, **kwargs)))
            self.engine.step()

    def after_resize(self, num_members: int, callback: Callable[[int], None]) -> None:
        """Hooks ``engine.set_train_batch_size``, which is given the batch of all members."""
        self._undo += hook_batch_size(self.engine, num_members, callback)

    def settle(self) -> None:
        """Does nothing: a step ends in the engine's own call."""

    def after_load(self, callback: Callable[[], None]) -> None:
        """Hooks ``engine.load_checkpoint``."""
        load = self.engine.load_checkpoint

        @wraps(load)
        def load_then_call(*args: Any, **kwargs: Any) -> Any:
            found = load(*args, **kwargs)
            if found[0] is not None:
                callback()
            return found

        self._undo.append(replace_method(self.engine, "load_checkpoint", load_then_call))

    # Skipped steps are counted.
    may_skip_steps = False

    def after_skip(self, callback: Callable[[], None]) -> None:
        """Does nothing: every step of the loop is counted."""

    def clear_gradients(self) -> None:
        """Does nothing: ``engine.step`` has zeroed them."""

    def show_norm(self, probe: GradientProbe) -> None:
        engine = self.engine
        take_step = engine._take_model_step
        is_plain = training_state.optimizer_kind(engine) == "plain"

        def take_step_and_show(*args: Any, **kwargs: Any) -> Any:
            if probe.is_active and is_plain:
                probe.norm = training_state.gradient_norm(engine)
            result = take_step(*args, **kwargs)
            if probe.is_active and not is_plain:
                norm = engine.get_global_grad_norm()
                probe.norm = None if norm is None else float(norm)
            return result

        self._undo.append(replace_method(engine, "_take_model_step", take_step_and_show))

    def around_update(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Hooks ``engine.optimizer.step``. Clipping precedes it or is part of it, and the scheduler follows it."""
        optimizer = self.engine.optimizer
        step = optimizer.step

        # torch's schedulers mark the step function with an attribute, and warn if it is missing. wraps() copies it.
        @wraps(step)
        def step_in_context(*args: Any, **kwargs: Any) -> Any:
            training_state.require_trained(self.engine)
            with context():
                return step(*args, **kwargs)

        self._undo.append(replace_method(optimizer, "step", step_in_context))

    def after_step(self, callback: Callable[[], None]) -> None:
        """Hooks ``engine.step`` and calls back after an optimizer step, but not after a micro-batch's step."""
        self._undo += call_after_step(self.engine, self._scheduler, callback)

    def watch(self, on_batch: Callable[[tuple, dict], None], on_loss: Callable[[torch.Tensor], None]) -> None:
        """Hooks the engine's training forward pass and ``engine.backward``."""
        engine = self.engine

        def before_forward(_: Any, args: tuple, kwargs: dict) -> None:
            if engine.module.training:
                on_batch(args, kwargs)

        returned: list[torch.Tensor | None] = [None]

        def after_forward(_: Any, args: Any, output: Any) -> None:
            if engine.module.training:
                returned[0] = found_loss(output)

        backward = engine.backward

        def backward_watched(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._has_foreign_loss |= loss is not returned[0] or bool(args or kwargs)
            returned[0] = None
            on_loss(loss)
            return backward(loss, *args, **kwargs)

        self._undo += [
            engine.register_forward_pre_hook(before_forward, with_kwargs=True).remove,
            engine.register_forward_hook(after_forward).remove,
            replace_method(engine, "backward", backward_watched),
        ]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients. On exit each submodule's mode and ZeRO 3's trace are what they were."""
        # Submodules can be in different modes: users keep frozen parts in evaluation mode.
        modes = [(part, part.training) for part in self.module.modules()]
        self.engine.eval()
        try:
            with training_state.without_trace(self.engine), torch.no_grad():
                yield
        finally:
            for part, was_training in modes:
                part.training = was_training

    def batch_loss(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> torch.Tensor:
        """[] the loss on one batch: a mapping is passed by keyword, a sequence by position, anything else as it is."""
        if evaluate is not None:
            return loss_of(evaluate(self.engine, batch))
        return loss_of(call_on(self.engine, to_device(batch, self.device)))

    def loss_scale(self) -> Mapping[str, Any] | None:
        return training_state.loss_scale(self.engine)

    def set_loss_scale(self, state: Mapping[str, Any]) -> None:
        training_state.set_loss_scale(self.engine, state)

    def optimizer_name(self) -> str:
        return type(self.engine.basic_optimizer).__name__

    def update_rule(self) -> str:
        return update_rule(self.engine.basic_optimizer)

    def counters(self) -> dict[str, int]:
        return training_state.counters(self.engine)

    def load_counters(self, counters: Mapping[str, int]) -> None:
        training_state.load_counters(self.engine, counters)

    def random_streams(self) -> dict[str, torch.Tensor]:
        return {}

    def load_random_streams(self, streams: Mapping[str, torch.Tensor]) -> None:
        """Does nothing: DeepSpeed has no stream of its own that training draws from."""

    def save_checkpoint(self, folder: Path, tag: str) -> None:
        """Saves an ordinary DeepSpeed checkpoint, which a run without a clan can resume (a member collective)."""
        self.engine.save_checkpoint(str(folder), tag=tag)

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """Weights and persistent buffers in host memory, gathered one by one; shared ones once."""
        return weights.full_weights(self.engine, self.place)

    def detach(self) -> None:
        while self._undo:
            self._undo.pop()()
