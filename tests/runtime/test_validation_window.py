"""The validation window: which examples, whose losses in which order, and what evaluation must leave alone."""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from clantune_scale.errors import ConfigError, EvaluationError
from clantune_scale.runtime.validation_window import ValidationWindow, loss_of
from tests.backends.small_runs import Net, ds_config, in_member_worlds, member_engine
from tests.ranks import run_ranks
from tests.small_clans import datasets


@dataclass
class FakeBackend:
    """A function in place of a model."""

    model: Any
    engine: str = "the engine"
    device = torch.device("cpu")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    dp_group = None

    def batch_loss(self, batch: Any, evaluate: Any) -> torch.Tensor:
        return loss_of(self.model(*batch) if evaluate is None else evaluate(self.engine, batch))


def numbers(count: int) -> TensorDataset:
    """The examples 0, 1, 2, ..."""
    return TensorDataset(torch.arange(count, dtype=torch.float64))


def examples(window: ValidationWindow) -> list[list[int]]:
    """The examples of each batch that this rank evaluates."""
    seen: list[list[int]] = []

    def model(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch.int().tolist())
        return batch.mean()

    window._dp_size = 1  # nobody to gather from: only this rank's batches are looked at
    window.losses(FakeBackend(model))
    return seen


@pytest.mark.parametrize(
    "count, num_samples, batch_size, dp_size, num_batches, size",
    [
        (1000, 256, 8, 1, 32, 8),
        (1000, 256, 8, 2, 32, 8),
        (1000, 256, 8, 3, 30, 8),  # 256 examples share out evenly over 3 ranks as 10 batches of 8 each
        (1000, 100, 16, 3, 6, 16),
        (20, 256, 8, 2, 2, 8),
        (5, 256, 8, 2, 2, 2),  # smaller than one batch per rank: smaller batches, one for each
        (3, 256, 8, 3, 3, 1),
        (1, 256, 8, 1, 1, 1),
    ],
)
def test_every_rank_gets_the_same_number_of_batches_of_one_size(
    count, num_samples, batch_size, dp_size, num_batches, size
):
    sizes = {"num_samples": num_samples, "batch_size": batch_size, "dp_size": dp_size}
    parts = [examples(ValidationWindow(numbers(count), dp_rank=rank, **sizes)) for rank in range(dp_size)]
    assert [len(part) for part in parts] == [num_batches // dp_size] * dp_size
    flat = [example for part in parts for batch in part for example in batch]
    assert {len(batch) for part in parts for batch in part} == {size}
    assert len(set(flat)) == len(flat) == num_batches * size <= num_samples
    # Spread over the whole dataset, its ends included.
    assert min(flat) == 0 and (max(flat) == count - 1 or len(flat) == 1)


@pytest.mark.parametrize("count, num_samples, dp_size, left", [(0, 256, 1, 0), (2, 256, 3, 2), (100, 1, 2, 1)])
def test_too_few_examples_are_an_error_with_the_numbers(count, num_samples, dp_size, left):
    message = (
        f"eval_data has {count} examples and the window takes {num_samples} at most, which leaves {left} for the "
        f"{dp_size} data-parallel ranks of a member. Give at least {dp_size} examples, and .*num_samples"
    )
    with pytest.raises(ConfigError, match=message):
        ValidationWindow(numbers(count), num_samples=num_samples, batch_size=4, dp_rank=0, dp_size=dp_size)


def test_a_dataset_without_a_length_is_an_error():
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(100))

    with pytest.raises(ConfigError, match="eval_data is a Stream without a length.*Pass a map-style dataset"):
        ValidationWindow(Stream(), num_samples=4, batch_size=4, dp_rank=0, dp_size=1)


def window_of(dataset: Any, **options: Any) -> ValidationWindow:
    return ValidationWindow(dataset, **{"num_samples": 8, "batch_size": 2, "dp_rank": 0, "dp_size": 1} | options)


def test_the_users_collate_makes_the_batches():
    window = window_of(numbers(8), collate_fn=lambda samples: (torch.stack([s[0] for s in samples]) * 10,))
    assert window.losses(FakeBackend(lambda batch: batch.mean())).tolist() == [5, 25, 45, 65]


Output = namedtuple("Output", "logits loss")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: loss,
        lambda loss: loss.reshape(1),
        lambda loss: {"logits": torch.zeros(2, 3), "loss": loss},
        lambda loss: Output(torch.zeros(2, 3), loss),
    ],
    ids=["scalar", "one element", "mapping", "object"],
)
def test_the_loss_is_found_in_what_models_return(wrap):
    window = window_of(numbers(8))
    losses = window.losses(FakeBackend(lambda batch: wrap(batch.mean())))
    assert losses.dtype == np.float64 and losses.tolist() == [0.5, 2.5, 4.5, 6.5]


@pytest.mark.parametrize(
    "output, what",
    [
        (torch.zeros(2, 50), r"a tensor of shape \[2, 50\]"),
        ({"logits": torch.zeros(2, 3)}, "a dict"),
        (Output(torch.zeros(2), None), r"a Output of 2: a tensor of shape \[2\], a NoneType"),
        # Which one is the loss is not guessed: logits of one sample may be one number too.
        ((torch.zeros(1, 1), torch.zeros(())), r"a tuple of 2: a tensor of shape \[1, 1\], a tensor of shape \[\]"),
        ((torch.zeros(()), torch.zeros(2, 3)), r"a tuple of 2: a tensor of shape \[\], a tensor of shape \[2, 3\]"),
        ([torch.zeros(())], r"a list of 1: a tensor of shape \[\]"),
        (None, "a NoneType"),
    ],
)
def test_a_model_that_returns_no_loss_is_told_what_to_do(output, what):
    message = rf"one loss per batch and the model returned {what}\. Return a scalar, or say which is the loss: pass"
    with pytest.raises(EvaluationError, match=message):
        loss_of(output)


@pytest.mark.parametrize("cast", [lambda x: x, float, np.float32, lambda x: {"loss": x}, lambda x: int(x * 2) / 2])
def test_evaluate_takes_the_place_of_the_models_loss(cast):
    seen = []

    def evaluate(engine: Any, batch: Any) -> Any:
        seen.append(engine)
        return cast(batch[0].mean())

    losses = window_of(numbers(8)).losses(FakeBackend(None), evaluate)
    assert losses.tolist() == [0.5, 2.5, 4.5, 6.5] and set(seen) == {"the engine"}


def test_losses_that_are_not_finite_come_through_where_they_are():
    values = iter([1.0, float("nan"), float("inf"), 2.0])
    losses = window_of(numbers(8)).losses(FakeBackend(lambda batch: torch.tensor(next(values))))
    assert np.array_equal(losses, [1.0, np.nan, np.inf, 2.0], equal_nan=True)


def test_what_is_drawn_during_evaluation_is_the_same_each_time_and_leaves_trainings_streams_alone():
    def draw(batch: torch.Tensor) -> torch.Tensor:
        return torch.rand(()) + np.random.rand() + random.random()

    window = window_of(numbers(8))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    undisturbed = (random.random(), np.random.rand(), float(torch.rand(())))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = window.losses(FakeBackend(draw))
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == undisturbed
    assert window.losses(FakeBackend(draw)).tolist() == first.tolist() and len(set(first)) == 4


def _evaluate_in_member(rank):
    clan, backend = member_engine(ds_config(1), 2)
    module = backend.module
    module.drop.p, module.first.training = 0.5, False  # a part that its user keeps in evaluation mode
    window = ValidationWindow(
        datasets()[1], num_samples=60, batch_size=8, dp_rank=backend.dp_rank, dp_size=backend.dp_size
    )
    is_recording = []

    def evaluate(engine, batch):
        is_recording.append(torch.is_grad_enabled())
        return engine(*batch)

    losses = window.losses(backend)
    assert window.losses(backend, evaluate).tolist() == losses.tolist() and is_recording == [False] * len(is_recording)
    modes = {name: part.training for name, part in module.named_modules()}
    return clan.member, losses, modes


def test_ranks_share_out_the_window_and_leave_every_modules_mode_as_it_was():
    results = run_ranks(4, in_member_worlds, _evaluate_in_member)
    model = Net(dropout=0.5).eval()
    # 60 examples make 7 batches of 8 in one process, and 6 where two ranks take as many each.
    indices = np.linspace(0, 63, 48).round().astype(int).reshape(6, 8)
    expected = [model(*datasets()[1][batch]).item() for batch in indices]
    assert {member for member, *_ in results} == {0, 1}
    for _, losses, modes in results:
        assert losses.tolist() == pytest.approx(expected, rel=1e-6)  # one batch, one order of sums: rounding alone
        assert losses.tolist() == results[0][1].tolist()
        assert modes == {"": True, "first": False, "second": True, "last": True, "drop": True}
