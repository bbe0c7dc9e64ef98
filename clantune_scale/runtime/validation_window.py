"""The common validation window: the same examples for every member, one loss per batch."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, default_collate

from clantune_scale.data.containers import tensors_in
from clantune_scale.data.sampler import is_map_style
from clantune_scale.errors import ConfigError, EvaluationError
from clantune_scale.runtime.engine_protocol import Evaluates

Evaluate = Callable[[Any, Any], Any]
_T = TypeVar("_T")


def loss_of(output: Any) -> torch.Tensor:
    """The scalar loss in what a module or a user's ``evaluate`` returned: itself, or its ``loss``.

    Which element of a tuple is the loss is the user's to say: with one sample in a batch, logits may be one number too.

    Raises:
        EvaluationError: if neither is a one-element tensor.
    """
    if isinstance(output, Real):
        return torch.tensor(float(output), dtype=torch.float64)
    candidate = output
    if isinstance(output, Mapping):
        candidate = output.get("loss")
    elif hasattr(output, "loss"):
        candidate = output.loss
    if not isinstance(candidate, torch.Tensor) or candidate.numel() != 1:
        raise EvaluationError(
            f"evaluation needs one loss per batch and the model returned {_described(output)}. Return a scalar, or say "
            f"which is the loss: pass evaluate=lambda model, batch: loss where the clan is attached."
        )
    return candidate


def _described(output: Any) -> str:
    """A model's output in a message; of a tuple, what its elements are."""
    if isinstance(output, torch.Tensor):
        return f"a tensor of shape {list(output.shape)}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)}: {', '.join(_described(part) for part in output)}"
    return f"a {type(output).__name__}"


def found_loss(output: Any) -> torch.Tensor | None:
    """As :func:`loss_of`; None if the output is something else (logits)."""
    try:
        return loss_of(output)
    except EvaluationError:
        return None


def require_fine_loss(loss: torch.Tensor) -> None:
    """Refuses a loss in 16 bits: members differ by less than its rounding.

    Raises:
        EvaluationError: if it is one.
    """
    if loss.dtype in (torch.bfloat16, torch.float16):
        raise EvaluationError(
            f"the model returns its loss in {loss.dtype}, whose neighbours are {torch.finfo(loss.dtype).eps:.1e} of it "
            f"apart, and members differ by less. Compute it in float32: cross_entropy(logits.float(), targets)."
        )


class ValidationWindow:
    """A fixed set of examples, in batches that are divided among the ranks of a member.

    Args:
        dataset: map-style; the window takes examples at even distances, in their order.
        num_samples: examples wanted; fewer if the dataset is smaller or batches do not divide evenly among ranks.
        batch_size: examples per forward pass on one rank.
        dp_rank, dp_size: this rank's place in the member's data parallelism.
        collate_fn: joins samples to a batch; torch's default if None.

    Attributes:
        num_batches: in the window, over all ranks of the member.
        seconds: this rank's time for its share of the last evaluation.

    Raises:
        ConfigError: if the dataset has no length, or fewer examples than the member has data-parallel ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_samples: int,
        batch_size: int,
        dp_rank: int,
        dp_size: int,
        collate_fn: Callable[[list], Any] | None = None,
    ) -> None:
        if not is_map_style(dataset):
            raise ConfigError(
                f"eval_data is a {type(dataset).__name__} without a length or an index, and every member must see the "
                f"same examples of it. Pass a map-style dataset, with __len__ and __getitem__."
            )
        length = len(dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length
        available = min(num_samples, length)
        if available < dp_size:
            raise ConfigError(
                f"eval_data has {length} examples and the window takes {num_samples} at most, which leaves "
                f"{available} for the {dp_size} data-parallel ranks of a member. "
                f"Give at least {dp_size} examples, and set clantune.fitness.num_samples to at least {dp_size}."
            )
        # Every rank runs the same number of forward passes: under ZeRO 3 each one is a collective.
        size = min(batch_size, available // dp_size)
        self.num_batches = available // (size * dp_size) * dp_size
        indices = np.linspace(0, length - 1, self.num_batches * size).round().astype(int)
        batches = indices.reshape(self.num_batches, size)
        self._mine = {b: batches[b].tolist() for b in range(dp_rank, self.num_batches, dp_size)}
        self._dataset = dataset
        self._collate = collate_fn or default_collate
        self._dp_size = dp_size
        self.seconds = 0.0

    @property
    def tokens_per_sample(self) -> int | None:
        """Elements of a sample's first tensor of whole numbers (token ids), or None if it has none."""
        with _own_randomness(0, torch.device("cpu")):
            sample = self._collate([self._dataset[0]])
        ids = (t for t in tensors_in(sample) if not t.is_floating_point() and t.dim() > 1)
        first = next(ids, None)
        return None if first is None else first.shape[1:].numel()

    def losses(self, backend: Evaluates, evaluate: Evaluate | None = None) -> np.ndarray:
        """[batches] float64: this member's mean loss on each batch; the same on all its ranks.

        A collective of the member. If ``evaluate`` is given, ``evaluate(engine, batch)`` replaces the model's loss.
        Random draws during the evaluation are the same for every member and in every round.
        """
        start = time.perf_counter()
        losses = self.each(backend, lambda batch: backend.batch_loss(batch, evaluate).detach())
        values = [loss.to(backend.device, torch.float64).reshape(()) for loss in losses]
        if backend.device.type == "cuda":
            torch.cuda.synchronize(backend.device)
        # Timed before the ranks wait for each other, so that a slow host stands out.
        self.seconds = time.perf_counter() - start
        return _gathered(torch.stack(values), self._dp_size, backend.dp_group)

    def each(self, backend: Evaluates, call: Callable[[Any], _T], *, at_most: int | None = None) -> list[_T]:
        """What ``call`` returns for each of this rank's batches, in evaluation mode (a member collective).

        Args:
            backend: the member's engine.
            call: gets a batch. Random draws in it are the batch's own.
            at_most: batches; all if None.
        """
        results = []
        with backend.evaluating():
            for number, indices in list(self._mine.items())[:at_most]:
                with _own_randomness(number, backend.device):
                    results.append(call(self._collate([self._dataset[index] for index in indices])))
        return results


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch, numpy and Python draw from ``seed``; on exit, training's streams are restored.

    Otherwise, a model or dataset that draws during evaluation (a diffusion step, an augmentation) would add noise to
    fitness, and training would depend on when fitness was measured.
    """
    python, numpy = random.getstate(), np.random.get_state()
    is_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if is_cpu else [device], device_type="cuda" if is_cpu else device.type):
        try:
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _gathered(mine: torch.Tensor, dp_size: int, dp_group: Any) -> np.ndarray:
    """[batches] in the window's order, from each rank's [batches / dp_size]: rank r holds r, r + dp_size, ..."""
    if dp_size == 1:
        return mine.cpu().numpy()
    parts = [torch.empty_like(mine) for _ in range(dp_size)]
    dist.all_gather(parts, mine, group=dp_group)
    return torch.stack(parts, dim=1).reshape(-1).cpu().numpy()
