"""Megatron-core's GPT with tensor, pipeline and data parallelism, bridged to the CPU in the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import clantune_scale
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader, StepPlan
from tests import megatron_shim
from tests.backends.families import Setup, is_on_line, join_groups
from tests.backends.megatron_models import build, initialize, master_weights, scheduler_of
from tests.backends.plain_gpt import CONTEXT, PlainGPT, token_datasets

__all__ = ["CASES", "MICRO", "PRELOAD", "TOLERANCE", "datasets", "start", "twin", "twin_loss"]

MICRO = 4
PRELOAD = "tests.preload_megatron"
DISTRIBUTED = {"distributed": True}
# One of 7,000 weights has a gradient so small that fifteen steps of AdamW make 2.7e-5 at 1e-2 of the order of sums.
LOW = 2.5e-3
LATE = DISTRIBUTED | {"overlap": True, "late_gather": True}
# The twin is tied, and so is every case; models that are not are trained in test_megatron.py.
CASES = {
    "tp": Setup(tp=2, clip=0.5, is_tied=True, is_slow=True),
    "pp": Setup(pp=2, accumulation=3, clip=0.5, is_tied=True),
    "dp": Setup(dp=2, lr=LOW, accumulation=2, clip=0.5, is_tied=True, is_slow=True),
    "dp-distributed": Setup(dp=2, clip=0.5, is_tied=True, options=DISTRIBUTED, is_slow=True),
    "dp-overlap": Setup(dp=2, lr=LOW, accumulation=2, clip=0.5, is_tied=True, options={"overlap": True}, is_slow=True),
    "three": Setup(members=3, is_tied=True, is_slow=True),
    "tp-sequence": Setup(tp=2, clip=0.5, is_tied=True, options={"sequence_parallel": True}, is_slow=True),
    "tp-pp": Setup(tp=2, pp=2, accumulation=2, clip=0.5, is_tied=True, is_slow=True),
    "dp-tp": Setup(dp=2, tp=2, clip=0.5, is_tied=True, is_slow=True),
    "pp-dp-distributed": Setup(
        pp=2, dp=2, lr=LOW, accumulation=2, clip=0.5, is_tied=True, options=DISTRIBUTED, is_slow=True
    ),
    "dp-late-gather": Setup(dp=2, lr=LOW, accumulation=2, clip=0.5, is_tied=True, options=LATE, is_slow=True),
    "dp-bf16": Setup(dp=2, dtype="bf16", optimizer="sgd", clip=0.5, is_tied=True, is_slow=True),
    "tp-bf16": Setup(tp=2, dtype="bf16", optimizer="sgd", is_tied=True, is_slow=True),
    # Adam's: equal to 6e-8 for three steps, and then, on some processors, the order of sums turns the rounding of a
    # weight to bf16, of which Adam makes 6e-4 in eight steps of 1e-2.
    "dp-distributed-bf16": Setup(
        dp=2, dtype="bf16", clip=0.5, is_tied=True, options=DISTRIBUTED, is_slow=True, tolerance=2e-3
    ),
}
# Two summation orders in float32, also of bf16's gradients, and AdamW's division by small second moments.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-6}


def datasets() -> tuple[Any, Any]:
    return token_datasets()


def twin() -> torch.nn.Module:
    return PlainGPT(is_tied=True)


def twin_loss(module: torch.nn.Module, batch: Any) -> torch.Tensor:
    return module(batch[0])


class Megatron:
    """A Megatron model in training, as its own loops train it."""

    def __init__(self, setup: Setup, block: dict | None) -> None:
        self._setup = setup
        self.model, self.optimizer = build(setup)
        self.scheduler = scheduler_of(setup, self.optimizer)
        self.clan, self._num_steps = None, 0
        train, valid = datasets()
        if block is None:
            self.loader = ClanDataLoader(train, self._flat_sampler(len(train)))
        else:
            self.clan = clantune_scale.attach_megatron(
                self.model,
                self.optimizer,
                self.scheduler,
                config=block,
                forward_step=forward_step,
                seq_length=CONTEXT,
                micro_batch_size=MICRO,
                num_microbatches=setup.accumulation,
                eval_data=valid,
            )
            self.loader = self.clan.loader(train)

    def _flat_sampler(self, num_samples: int) -> ClanBatchSampler:
        from megatron.core import parallel_state

        return ClanBatchSampler(
            num_samples,
            seed=0,
            micro_batch_size=MICRO,
            dp_size=parallel_state.get_data_parallel_world_size(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            member=0,
            population_size=1,
            plan=lambda step: StepPlan(False, self._setup.accumulation, self._setup.accumulation),
        )

    def train(self, num_steps: int) -> None:
        if is_on_line(self.clan):
            for step in self.clan.steps(self.loader, until=num_steps):
                self._one_step(iter(step), len(step))
            return
        batches = _forever(self.loader)
        while self.num_steps < num_steps:
            self._one_step(batches, self.clan.num_microbatches if self.clan else self._setup.accumulation)

    def _one_step(self, batches: Iterator[Any], num_microbatches: int) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=num_microbatches,
            seq_length=CONTEXT,
            micro_batch_size=MICRO,
            forward_only=False,
        )
        is_updated, *_ = self.optimizer.step()
        if self.scheduler is not None and is_updated:
            self.scheduler.step(increment=1)
        self._num_steps += 1

    @property
    def num_steps(self) -> int:
        return self._num_steps if self.clan is None else self.clan.num_steps

    def weights(self) -> dict[str, torch.Tensor]:
        return master_weights(self.model, self.optimizer)


def _forever(loader: ClanDataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def start(setup: Setup, block: dict | None) -> Megatron:
    megatron_shim.install()
    join_groups(block)
    initialize(setup)
    return Megatron(setup, block)


def forward_step(data_iterator: Any, model: Any) -> Any:
    """One micro-batch, as Megatron's training scripts write it."""
    window = next(data_iterator)[0]
    tokens, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    positions = torch.arange(CONTEXT).expand(len(tokens), -1)
    mask = torch.ones(1, 1, CONTEXT, CONTEXT).tril() < 0.5
    return model(tokens, positions, mask, labels=labels), _loss


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, dict]:
    loss = output.float().mean()
    return loss, {"lm loss": loss.detach().clone()}
