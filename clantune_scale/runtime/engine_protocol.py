"""What a clan asks of an engine, in small protocols. A backend implements all of them; nothing else names an engine.

============================  =====================================================
Protocol                      Used by
============================  =====================================================
:class:`EnginePlace`          samplers, process groups, the check at the start
:class:`UpdateHooks`          the clan: it counts steps and watches training
:class:`SharesGrads`          the clan: it says who averages gradients with whom
:class:`Settings`             genome application
:class:`Evaluates`            the validation window
:class:`ValidationGradients`  slopes of learning rates
:class:`RandomState`          rounds on disk
:class:`EngineState`          transfers, snapshots, rounds on disk, the champion
============================  =====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from clantune_scale.checkpoint.streams import RandomState
from clantune_scale.core.line import DecayRule
from clantune_scale.gradients.hooks import GradientGroups
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.transfer import MemberState


class HasDevice(Protocol):
    """Where an engine computes.

    Attributes:
        device: of the parameters.
    """

    @property
    def device(self) -> torch.device: ...


class EnginePlace(HasDevice, Protocol):
    """A rank's place in its member.

    Attributes:
        engine: what the user trains with, and what a user's ``evaluate`` is given.
        module: the user's module (this rank's part of it).
        pp_rank, pp_size, dp_rank, dp_size, tp_rank, tp_size: this rank's place among the member's pipeline stages,
            data-parallel replicas and tensor shards. In the member's world ranks are ordered
            ``[pipeline, data, tensor]``, tensor fastest.
        dp_group: the member's ranks that hold the same part of the model as this one, ``dp_size`` of them.
        micro_batch_size: samples per rank and backward pass.
    """

    @property
    def engine(self) -> Any: ...

    @property
    def module(self) -> torch.nn.Module: ...

    @property
    def pp_rank(self) -> int: ...

    @property
    def pp_size(self) -> int: ...

    @property
    def dp_rank(self) -> int: ...

    @property
    def dp_size(self) -> int: ...

    @property
    def tp_rank(self) -> int: ...

    @property
    def tp_size(self) -> int: ...

    @property
    def dp_group(self) -> Any: ...

    @property
    def micro_batch_size(self) -> int: ...


class UpdateHooks(Protocol):
    """Hooks on the steps of training.

    Attributes:
        num_steps: optimizer steps done.
    """

    @property
    def num_steps(self) -> int: ...

    def around_update(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Enters ``context()`` just around the optimizer's own update: after clipping, before the scheduler."""

    def after_step(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` after each optimizer step, when the engine is done with it."""

    def watch(self, on_batch: Callable[[tuple, dict], None], on_loss: Callable[[torch.Tensor], None]) -> None:
        """Shows each training forward's arguments and each loss that goes backward."""

    def exchanging(self, is_last: bool) -> AbstractContextManager[None]:
        """The context of one micro-batch's forward and backward in :meth:`clan.steps`.

        Gradients cross ranks in a step's last one only.
        """

    @property
    def own_step(self) -> Callable[[list[tuple[tuple[Any, ...], dict[str, Any]]]], object] | None:
        """One optimizer step on the (args, kwargs) of forward passes, as the loop does it; None if it is not known."""

    def after_skip(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` after a step of the loop that updated nothing and is not counted."""

    def after_resize(self, num_members: int, callback: Callable[[int], None]) -> None:
        """Calls ``callback`` with each member's micro-batches per step when the script changes the batch size.

        Args:
            num_members: that divide the batch which the script asks for.
            callback: sets the number.
        """

    def settle(self) -> None:
        """Ends a step that the loop has left, and follows a checkpoint that it has loaded, if that is due."""

    def after_load(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` when the script has loaded a checkpoint into the engine, before training goes on."""

    @property
    def may_skip_steps(self) -> bool:
        """Whether a step of the loop may update nothing and not be counted, because scaled gradients overflowed."""

    def clear_gradients(self) -> None:
        """Drops gradients that a loop has not zeroed yet, before a step that the loop does not know of."""

    def show_norm(self, probe: GradientProbe) -> None:
        """Shows ``probe`` the gradient norm before clipping, in the steps in which it is active."""

    def detach(self) -> None:
        """Takes every hook off the engine again."""


class SharesGrads(Protocol):
    """Averages gradients across members."""

    def share_gradients(
        self,
        team: Callable[[], tuple[int, ...]],
        groups: GradientGroups,
        probe: GradientProbe | None = None,
    ) -> None:
        """Averages gradients over the members that ``team()`` names in each step; shows them to ``probe``."""


class Settings(Protocol):
    """What genes set.

    Attributes:
        clip: gradient-norm threshold, 0 if clipping is off; writable.
        accumulation: micro-batches per optimizer step; writable between steps.
    """

    clip: float
    accumulation: int

    def param_groups(self) -> list[dict[str, Any]]:
        """The live groups of the optimizer that applies the update, by reference."""

    def optimizer_name(self) -> str:
        """The class of the optimizer that applies the update."""

    def update_rule(self) -> str:
        """How that optimizer updates, by :func:`clantune_scale.config.default_genes.update_rule`."""


class Evaluates(HasDevice, Protocol):
    """Computes losses without training.

    Attributes:
        dp_group: over which a member's ranks share a window's batches out.
    """

    @property
    def dp_group(self) -> Any: ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode without gradients; on exit the mode is what it was."""

    def batch_loss(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> torch.Tensor:
        """[] the loss of one validation batch, equal on all ranks of a replica; without gradients.

        Args:
            batch: as the data loader gives it.
            evaluate: the user's ``(engine, batch) -> loss``; None for the model's own loss.
        """


class ValidationGradients(Protocol):
    """Gradients of validation losses, beside those that the loop holds, which stay as they are."""

    def of_batch(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> Sequence[torch.Tensor | None]:
        """[masters] the gradient of a batch's loss, sharded as the masters are; None where the loss has none.

        Called inside ``evaluating``. If masters are sharded, it is that of the mean loss over the ranks' batches.

        Raises:
            EvaluationError: if the loss has no gradient.
        """

    def joined(self, mine: torch.Tensor) -> torch.Tensor:
        """[batches, ...] the same on all ranks, from sums over this rank's elements.

        Args:
            mine: [own batches, ...] linear functions of the gradients that ``of_batch`` gave.
        """


class EngineState(Protocol):
    """What training has changed in an engine, and what a clone or a resumed run takes over."""

    def masters(self) -> list[torch.Tensor]:
        """This rank's live weights that the optimizer updates: in fp32, but for loops that have none in fp32."""

    @property
    def moves_with_weights(self) -> bool:
        """Whether weights may be moved while the optimizer's state stays: no copy of them is in it.

        All ranks find the same after a step if each has a part of some weight.
        """

    @property
    def has_inference_weights(self) -> bool:
        """Whether the optimizer has an evaluation mode, so that the weights that train are not to be measured."""

    def inference_weights(self) -> AbstractContextManager[None]:
        """Inside, the model holds the weights that the optimizer wants to be evaluated and saved.

        They are others than those that train for optimizers with an evaluation mode (schedule-free ones).
        """

    def groups_of_masters(self) -> list[int]:
        """[masters] the index of each one's parameter group."""

    def in_update(self) -> list[bool]:
        """[masters] whether the next update changes each; the optimizer passes over all others."""

    def decay_rules(self) -> list[DecayRule | None]:
        """[groups] how the optimizer applies a weight decay; None if no linear rule is known."""

    def validation_gradients(self) -> ValidationGradients | str:
        """Gives gradients of validation losses; or says why this engine cannot."""

    def refresh(self) -> None:
        """Brings the weights that the model computes with up to date with the masters (member collective)."""

    def state(self) -> MemberState:
        """This rank's live training state."""

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """The member's whole weights and buffers, by name, in host memory (member collective).

        One rank of each pipeline stage has its stage's, tensor shards joined: together they are the model, and no
        name is there twice. None on all others.
        """

    def loss_scale(self) -> Mapping[str, Any] | None:
        """The state of the dynamic loss scale, ``"cur_scale"`` among it, or None without one."""

    def set_loss_scale(self, state: Mapping[str, Any]) -> None:
        """Takes over a state that ``loss_scale`` returned."""

    def counters(self) -> dict[str, int]:
        """What the engine counts for itself and a resumed run goes on from: steps, micro-batches, samples."""

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Takes over such counts; ``num_steps`` follows them. Called after the accumulation was set."""


class TunedEngine(EnginePlace, Settings, Protocol):
    """An engine that genes are written into."""


class MeasuredEngine(Evaluates, EngineState, Protocol):
    """An engine that is evaluated with its own weights and with their averages."""


class Backend(EnginePlace, UpdateHooks, SharesGrads, Settings, Evaluates, RandomState, EngineState, Protocol):
    """One member's engine: all that a clan asks of it."""
