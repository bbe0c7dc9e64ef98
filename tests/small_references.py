"""A reference clan on a regression of a few samples, small enough for hundreds of rounds in a test."""

from __future__ import annotations

import torch

from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies import RunFacts, Strategy, build
from clantune_scale.reference.clan import ReferenceClan

LR = Gene("lr", relative=True)
DROPOUT = Gene("dropout", kind="specialized", scale="linear", bounds=(0.0, 0.5), initial=0.1, step_size=0.05)
FEATURES, SAMPLES = 5, 6


def strategy_of(name: str, *genes: Gene, population: int = 4, length: int = 6, total: int | None = None, **options):
    facts = RunFacts(population, genes, 3, length, duty_cycle=0.34, total_steps=total)
    return build(name, facts, options)


def network(dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(FEATURES, 8), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1)]
    return torch.nn.Sequential(*layers).double()


def squared_error(module: torch.nn.Module, batch) -> torch.Tensor:
    inputs, targets = batch
    return ((module(inputs) - targets) ** 2).mean()


def samples(*key: int):
    """A batch of a fixed nonlinear regression, the same for the same key."""
    generator = torch.Generator().manual_seed(sum(part * 1000**place for place, part in enumerate(key)))
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    return inputs, torch.sin(inputs.sum(dim=1, keepdim=True))


def batch(step: int, member: int, micro: int, plan):
    return samples(step, micro, plan.team_index if plan.is_common else member)


def clan_of(strategy: Strategy, module: torch.nn.Module | None = None, **changes) -> ReferenceClan:
    settings = {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0),
        "loss_fn": squared_error,
        "batch": batch,
        "eval_batches": [samples(900 + i) for i in range(3)],
    }
    return ReferenceClan(module or network(), strategy=strategy, **settings | changes)


def weights(member) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in member.parameters])


def averaged_weights(member) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in member.average])
