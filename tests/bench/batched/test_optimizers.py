"""Every batched update rule against the real optimizer, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from clantune_scale.bench.batched.optimizers import OPTIMIZERS, Momentum, register
from clantune_scale.bench.batched.state import RowLayout, State
from clantune_scale.errors import ConfigError

SHAPES = [torch.Size(shape) for shape in ((6, 4), (3, 7), (5,), (), (2, 3, 4))]
STEPS = 12
# Both do the same arithmetic in float64, sums in another order: 1e-16 relative, raised by divisions in a dozen steps.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2, line by line; torch has none."""

    def __init__(self, params, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                momentum = self.state[p].setdefault("m", torch.zeros_like(p))
                update = (beta1 * momentum + (1 - beta1) * p.grad).sign()
                momentum.mul_(beta2).add_((1 - beta2) * p.grad)
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))


class MuonAndAdamW:
    """torch's two, as one has to use them."""

    def __init__(self, params: Sequence[torch.Tensor], lr: float, weight_decay: float) -> None:
        matrices = [p for p in params if p.dim() == 2]
        rest = [p for p in params if p.dim() != 2]
        own = {"lr": lr, "weight_decay": weight_decay}
        self.both = [
            torch.optim.Muon(matrices, **own, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, **own, betas=(0.9, 0.95)),
        ]

    def step(self) -> None:
        for optimizer in self.both:
            optimizer.step()


REAL: dict[str, tuple[str, dict[str, float], Callable]] = {
    "adamw": ("adamw", {"beta2": 0.95}, lambda p, lr, wd: torch.optim.AdamW(p, lr, (0.9, 0.95), weight_decay=wd)),
    "sgd": ("sgd", {}, lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=wd)),
    "plain sgd": ("sgd", {"momentum": 0.0}, lambda p, lr, wd: torch.optim.SGD(p, lr, weight_decay=wd)),
    "nesterov": (
        "nesterov",
        {"momentum": 0.8},
        lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.8, nesterov=True, weight_decay=wd),
    ),
    "lion": ("lion", {"beta1": 0.95}, lambda p, lr, wd: Lion(p, lr, wd, (0.95, 0.99))),
    "rmsprop": ("rmsprop", {}, lambda p, lr, wd: torch.optim.RMSprop(p, lr, weight_decay=wd)),
    "rmsprop with momentum": (
        "rmsprop",
        {"momentum": 0.9, "alpha": 0.95},
        lambda p, lr, wd: torch.optim.RMSprop(p, lr, alpha=0.95, momentum=0.9, weight_decay=wd),
    ),
    "adafactor": ("adafactor", {}, lambda p, lr, wd: torch.optim.Adafactor(p, lr, weight_decay=wd)),
    "muon": ("muon", {}, MuonAndAdamW),
}
RATES = ((0.01, 0.02), (0.3, 0.6))


def test_every_rule_is_compared():
    own = {name for name in OPTIMIZERS if not name.startswith("test-")}  # what another test has registered
    assert {name for name, *_ in REAL.values()} == own


@pytest.fixture
def in_full_precision(monkeypatch):
    """torch's Muon orthogonalizes in bfloat16, and then agrees to two digits only."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.usefixtures("in_full_precision")
@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["no decay", "decay"])
@pytest.mark.parametrize("is_shared", [True, False], ids=["one gradient", "own gradients"])
@pytest.mark.parametrize("name", REAL)
def test_a_rule_does_what_the_real_optimizer_does(name, is_shared, decay):
    ours, theirs = updated(name, decay=decay, is_shared=is_shared)
    for mine, real in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, real, **TOLERANCE)


def test_muon_as_torch_has_it_differs_by_the_rounding_of_bfloat16():
    ours, theirs = updated("muon", decay=0.0, is_shared=True)
    starts = torch.stack([initial(clan) for clan in range(2)]).repeat_interleave(2, 0)
    for mine, real, start in zip(ours, theirs, starts, strict=True):
        # Three digits of bfloat16 through five iterations, over a dozen steps. Seen: 0.6 %.
        assert (mine - real).norm() < 0.03 * (real - start).norm()


def test_slots_stay_one_per_clan_while_gradients_are_shared():
    for name, rule in OPTIMIZERS.items():
        state, layout, hyper = begun(name, {}, decay=0.0)
        rule.update(state, torch.randn(2, 1, layout.size, dtype=torch.float64), hyper, layout)
        assert {slot.shape[1] for slot in state.slots.values()} == {1}, name


def test_another_rule_is_registered_under_a_name_of_its_own(monkeypatch):
    monkeypatch.setattr("clantune_scale.bench.batched.optimizers.OPTIMIZERS", {})
    register("mine", Momentum())
    with pytest.raises(ConfigError, match="'mine' already"):
        register("mine", Momentum())


def initial(clan: int) -> torch.Tensor:
    return torch.randn(RowLayout(SHAPES).size, dtype=torch.float64, generator=torch.Generator().manual_seed(clan))


def begun(name: str, hyper: dict[str, float], *, decay: float):
    """Two clans of two members with rates of their own."""
    rule, layout = OPTIMIZERS[name], RowLayout(SHAPES)
    state = State.initial(torch.stack([initial(0), initial(1)]), 2, rule.slot_sizes(layout))
    values = {"weight_decay": decay, **rule.defaults, **hyper}
    told = {key: torch.full((2, 1, 1), value, dtype=torch.float64) for key, value in values.items()}
    return state, layout, {**told, "lr": torch.tensor(RATES, dtype=torch.float64).unsqueeze(-1)}


def updated(name: str, *, decay: float, is_shared: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """[clans x members] rows of weights after some steps: the rule's, and the real optimizer's."""
    rule_name, own, make = REAL[name]
    state, layout, hyper = begun(rule_name, own, decay=decay)
    models, generator = [], torch.Generator().manual_seed(5)
    for clan, rates in enumerate(RATES):
        for rate in rates:
            parameters = [part[0, 0].clone().requires_grad_() for part in layout.parts(initial(clan).view(1, 1, -1))]
            models.append((parameters, make(parameters, rate, decay)))
    for _ in range(STEPS):
        members = 1 if is_shared else 2
        gradient = torch.randn(2, members, layout.size, generator=generator, dtype=torch.float64)
        OPTIMIZERS[rule_name].update(state, gradient, hyper, layout)
        rows = gradient.expand(2, 2, -1).reshape(4, 1, 1, -1)
        for (parameters, optimizer), row in zip(models, rows, strict=True):
            for parameter, part in zip(parameters, layout.parts(row), strict=True):
                parameter.grad = part[0, 0].clone()
            optimizer.step()
    theirs = [torch.cat([p.detach().reshape(-1) for p in parameters]) for parameters, _ in models]
    return list(state.weights.flatten(0, 1)), theirs
