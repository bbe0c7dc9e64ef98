"""The common validation window: the same examples for every member, one loss per batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, default_collate

from clantune_scale.backends.base import Backend
from clantune_scale.errors import ConfigError, EvaluationError

Evaluate = Callable[[Any, Any], Any]


def loss_of(output: Any) -> torch.Tensor:
    """The scalar loss in a module's output: the output itself, its ``loss``, or its first element.

    Raises:
        EvaluationError: if none of these is a one-element tensor.
    """
    candidate = output
    if isinstance(output, Mapping):
        candidate = output.get("loss")
    elif hasattr(output, "loss"):
        candidate = output.loss
    elif isinstance(output, tuple | list) and output:
        candidate = output[0]
    if not isinstance(candidate, torch.Tensor) or candidate.numel() != 1:
        what = f"a tensor of shape {list(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise EvaluationError(
            f"evaluation needs one loss per batch and the model returned {what}. "
            f"Return a scalar, or pass evaluate=lambda engine, batch: loss to initialize()."
        )
    return candidate


class ValidationWindow:
    """A fixed set of examples, in batches that the ranks of a member share out.

    Args:
        dataset: map-style; the window is spread evenly over it, in its order.
        num_samples: examples wanted; fewer where the dataset is smaller or batches do not share out evenly.
        batch_size: examples per forward pass on one rank.
        dp_rank, dp_size: this rank's place in the member's data parallelism.
        collate_fn: joins samples to a batch; torch's default where None.

    Raises:
        ConfigError: if the dataset has fewer examples than the member has data-parallel ranks.
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
        available = min(num_samples, len(dataset))
        if available < dp_size:
            raise ConfigError(
                f"eval_data has {len(dataset)} examples, of which {available} are used, and a member has {dp_size} "
                f"data-parallel ranks that each evaluate some. Give at least {dp_size} examples."
            )
        # Every rank runs the same number of forward passes: under ZeRO 3 each one is a collective.
        size = min(batch_size, available // dp_size)
        self.num_batches = available // (size * dp_size) * dp_size
        indices = np.linspace(0, len(dataset) - 1, self.num_batches * size).round().astype(int)
        batches = indices.reshape(self.num_batches, size)
        self._mine = [batches[b].tolist() for b in range(dp_rank, self.num_batches, dp_size)]
        self._dataset = dataset
        self._collate = collate_fn or default_collate
        self._dp_size = dp_size

    def losses(self, backend: Backend, evaluate: Evaluate | None = None) -> np.ndarray:
        """[batches] float64: this member's mean loss on each batch; the same on all its ranks.

        A member collective. What ``evaluate(engine, batch)`` returns takes the place of the model's loss.
        """
        values = []
        with backend.evaluating():
            for indices in self._mine:
                batch = self._collate([self._dataset[index] for index in indices])
                output = backend.forward(batch) if evaluate is None else evaluate(backend.engine, batch)
                values.append(loss_of(output if isinstance(output, torch.Tensor) else _as_loss(output)).float())
        return _gathered(torch.stack([value.reshape(()) for value in values]), self._dp_size)


def _as_loss(output: Any) -> Any:
    """A Python number that the user's ``evaluate`` returned, as a tensor; anything else as it is."""
    return torch.tensor(float(output)) if isinstance(output, int | float) else output


def _gathered(mine: torch.Tensor, dp_size: int) -> np.ndarray:
    """[batches] in the window's order, from each rank's [batches / dp_size]; rank r holds batches r, r + dp_size, ..."""
    mine = mine.double()
    if dist.get_world_size() == 1:
        return mine.cpu().numpy()
    parts = [torch.empty_like(mine) for _ in range(dp_size)]
    dist.all_gather(parts, mine)
    return torch.stack(parts, dim=1).reshape(-1).cpu().numpy()
