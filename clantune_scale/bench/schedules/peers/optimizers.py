"""Optimizers that promise to spare the user the schedule, each set up as its package advises.

What a problem configures is passed on as far as a package knows it: weight decay, betas, epsilon, momentum. The
learning rate is the start's with ``schedulefree``; Prodigy and D-Adaptation estimate their own, and are given 1.0, so
that all starts of a problem that differ only in the learning rate are one run to them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from clantune_scale.bench.batched import OPTIMIZERS, Settings
from clantune_scale.bench.schedules import curves
from clantune_scale.bench.schedules.peers.extra import imported
from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.errors import ConfigError

Parameters = Sequence[torch.Tensor]
#: Optimizers that most peers have a form of, and those whose weight decay is apart from the gradient.
_FORMS, _DECOUPLED = ("adamw", "sgd"), ("adamw", "lion", "muon", "adafactor")


@dataclass(frozen=True)
class Setup:
    """An optimizer on parameters, and what the package wants done around its steps.

    Attributes:
        optimizer: one of torch's kind.
        factor: on its learning rate in the step after so many; None if nothing is to be set from outside.
        evaluates: called before weights are evaluated.
    """

    optimizer: torch.optim.Optimizer
    factor: Callable[[int], float] | None = None
    evaluates: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class OptimizerPeer:
    """A row of the table: single runs of an optimizer, each of one member that takes the whole batch.

    Attributes:
        name: of the row.
        module: that it needs.
        setup: from parameters, settings (with the start's learning rate and schedule) and problem.
    """

    name: str
    module: str
    setup: Callable[[Parameters, Settings, Problem], Setup]

    def check(self) -> None:
        """Raises a ConfigError if its package is not there."""
        imported(self.module, method=self.name)


def _torch(parameters: Parameters, settings: Settings, problem: Problem) -> Setup:
    """torch's own: what ``fixed`` does, by another way."""
    _check(settings, "torch")
    hyper = _hyper(settings)
    lr, decay = settings.lr, settings.weight_decay
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr, betas=_betas(hyper), eps=hyper["eps"], weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(parameters, lr, momentum=hyper["momentum"], weight_decay=decay)
    return Setup(optimizer, settings.schedule)


def _schedule_free(scale: Mapping[str, float]) -> Callable[[Parameters, Settings, Problem], Setup]:
    """Its advice: no schedule, a warm-up (its own), and evaluation in eval mode; rates times ``scale``."""

    def setup(parameters: Parameters, settings: Settings, problem: Problem) -> Setup:
        package = imported("schedulefree", method="schedulefree")
        _check(settings, "schedulefree")
        hyper = _hyper(settings)
        own = {
            "lr": settings.lr * scale[settings.optimizer],
            "weight_decay": settings.weight_decay,
            "warmup_steps": round(curves.WARMUP * problem.total_steps) if problem.knows_length else 0,
        }
        if settings.optimizer == "adamw":
            optimizer = package.AdamWScheduleFree(parameters, betas=_betas(hyper), eps=hyper["eps"], **own)
        else:
            # Its momentum is the place between average and iterate where gradients are taken: 0 is none.
            momentum = {"momentum": hyper["momentum"]} if hyper["momentum"] > 0 else {}
            optimizer = package.SGDScheduleFree(parameters, **momentum, **own)
        optimizer.train()
        return Setup(optimizer, evaluates=optimizer.eval)

    return setup


def _prodigy(parameters: Parameters, settings: Settings, problem: Problem) -> Setup:
    """Its advice: lr 1, cosine annealing to the end. It is an Adam whatever the problem's optimizer is."""
    package, is_decoupled = imported("prodigyopt", method="prodigy"), settings.optimizer in _DECOUPLED
    own = _adam_options(settings)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which weight decay it uses
        optimizer = package.Prodigy(parameters, lr=1.0, decouple=is_decoupled, **own)
    return Setup(optimizer, _annealing(problem))


def _d_adaptation(parameters: Parameters, settings: Settings, problem: Problem) -> Setup:
    """Its advice: lr 1 and the scheduler that one would use anyway: here, as for Prodigy, cosine annealing."""
    package = imported("dadaptation", method="dadapt")
    _check(settings, "dadapt")
    if settings.optimizer == "adamw":
        own = _adam_options(settings)
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = package.DAdaptAdam(parameters, lr=1.0, decouple=True, **own)
    else:
        own = {"momentum": _hyper(settings)["momentum"], "weight_decay": settings.weight_decay}
        optimizer = package.DAdaptSGD(parameters, lr=1.0, **own)
    return Setup(optimizer, _annealing(problem))


def _annealing(problem: Problem) -> Callable[[int], float] | None:
    """Without a warm-up: the estimates start low by themselves, Prodigy's advice is against it, and D-Adaptation's SGD
    divides by a first rate of 0."""
    return curves.over("cosine", problem.total_steps) if problem.knows_length else None


def _check(settings: Settings, method: str) -> None:
    """Raises a ConfigError for an optimizer that the method has no form of."""
    if settings.optimizer not in _FORMS:
        raise ConfigError(
            f"method {method!r} has no form of the optimizer {settings.optimizer!r}. Leave it away, or draw problems "
            f"with {' or '.join(_FORMS)} only."
        )


def _hyper(settings: Settings) -> dict[str, float]:
    return {**OPTIMIZERS[settings.optimizer].defaults, **settings.hyper}


def _betas(hyper: Mapping[str, float]) -> tuple[float, float]:
    return hyper["beta1"], hyper["beta2"]


def _adam_options(settings: Settings) -> dict[str, object]:
    """Adam's, from settings that may be SGD's: then the package's own betas."""
    own: dict[str, object] = {"weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        hyper = _hyper(settings)
        own |= {"betas": _betas(hyper), "eps": hyper["eps"]}
    return own


#: By name. ``schedulefree-advised`` takes the low ends of the package's advice, 10 to 50 times the classical rate for
#: SGD and 1 to 10 times for AdamW: times ten is what momentum 0.9, which it has not, makes of a rate.
OPTIMIZER_PEERS = {
    peer.name: peer
    for peer in (
        OptimizerPeer("torch", "torch", _torch),
        OptimizerPeer("schedulefree", "schedulefree", _schedule_free({"adamw": 1.0, "sgd": 1.0})),
        OptimizerPeer("schedulefree-advised", "schedulefree", _schedule_free({"adamw": 1.0, "sgd": 10.0})),
        OptimizerPeer("prodigy", "prodigyopt", _prodigy),
        OptimizerPeer("dadapt", "dadaptation", _d_adaptation),
    )
}
