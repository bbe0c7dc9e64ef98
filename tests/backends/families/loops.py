"""What the FSDP2 and DDP families share: networks, optimizers, and a run in a plain loop."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import clantune_scale
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader, StepPlan
from clantune_scale.gradients.clip import clip_grad_norm_
from tests.backends.families import Setup

MICRO = 4
# Whoever lets go of a DDP module last joins gloo's threads and holds the interpreter's lock meanwhile, for which one
# of them may be waiting to put away a tensor (torch 2.13): a rank hung so in one run of ten on a busy machine.
_kept: list[Any] = []


class TiedNet(nn.Module):
    """A small language model over 16 tokens; the head's weight is the embedding's."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.token = nn.Embedding(16, 12)
        self.mlp = Mlp(12, 24)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 16, bias=False)
        self.head.weight = self.token.weight
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.token(tokens)
        hidden = self.norm(hidden + self.mlp(hidden))
        return nn.functional.cross_entropy(self.head(hidden).float().flatten(0, 1), targets.flatten())


class Mlp(nn.Module):
    """Two layers, the first split by columns and the second by rows where there is tensor parallelism."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def token_datasets() -> tuple[torch.utils.data.TensorDataset, torch.utils.data.TensorDataset]:
    """Sequences in which a token mostly says the next: train, validation."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(16, (704, 6), generator=generator)
    noise = torch.rand(tokens.shape, generator=generator) < 0.2
    targets = torch.where(noise, torch.randint(16, tokens.shape, generator=generator), (5 * tokens + 3) % 16)
    everything = list(zip(tokens.split(640), targets.split(640), strict=True))
    return torch.utils.data.TensorDataset(*everything[0]), torch.utils.data.TensorDataset(*everything[1])


def make_optimizer(setup: Setup, model: nn.Module) -> torch.optim.Optimizer:
    if setup.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=setup.lr, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=setup.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)


class Loop:
    """A user's loop, with a clan or without; the loss is the model's own."""

    def __init__(self, setup: Setup, model: nn.Module, block: dict | None, data: Any, **options: Any) -> None:
        self._setup, self.model = setup, model
        _kept.append(model)
        self._optimizer = make_optimizer(setup, model)
        train_set, valid = data
        self.clan = None
        if block is not None:
            self.clan = clantune_scale.attach(
                model,
                self._optimizer,
                config=block,
                eval_data=valid,
                micro_batch_size=MICRO,
                accumulation=setup.accumulation,
                gradient_clipping=setup.clip,
                **options,
            )
            self._loader: Any = self.clan.loader(train_set)
            return
        self._num_steps = 0
        dp_size = dist.get_world_size() // setup.tp
        sampler = ClanBatchSampler(
            len(train_set),
            seed=0,
            micro_batch_size=MICRO,
            dp_size=dp_size,
            dp_rank=dist.get_rank() // setup.tp,
            member=0,
            population_size=1,
            plan=lambda step: StepPlan(False, setup.accumulation, setup.accumulation),
        )
        self._loader = ClanDataLoader(train_set, sampler)

    def train(self, num_steps: int) -> None:
        if self.clan is None:
            return self._train_alone(num_steps)
        for step in self.clan.steps(self._loader, until=num_steps):
            for batch in step:
                (self.model(*batch) / len(step)).backward()
            self.clan.clip_grad_norm_()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return None

    def _train_alone(self, num_steps: int) -> None:
        num_micro = self._setup.accumulation
        while self._num_steps < num_steps:
            for number, batch in enumerate(self._loader, start=1):
                with self.exchanging(number % num_micro == 0):
                    (self.model(*batch) / num_micro).backward()
                if number % num_micro:
                    continue
                if self._setup.clip:
                    clip_grad_norm_(self.model.parameters(), self._setup.clip)
                self._optimizer.step()
                self._optimizer.zero_grad()
                self._num_steps += 1
                if self._num_steps >= num_steps:
                    return

    def exchanging(self, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients cross ranks in a step's last micro-batch alone, as torch has it done without a clan."""
        raise NotImplementedError
