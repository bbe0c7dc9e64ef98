"""Points on one model's line against members that really train, one round."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.line import Line, averaging_weight
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.runtime.line.decays import decay_rule
from clantune_scale.runtime.line.points import Points

STEPS, START_STEP, WINDOW, CLIP = 40, 60, 24, 0.5
PLAN = RoundPlan(3, START_STEP, (Phase(PhaseKind.COOPERATIVE, STEPS),), uses_ema=True, ema_window_steps=WINDOW)
GENES = (
    Gene("lr", relative=True),
    Gene("weight_decay", relative=True),
    Gene("lr:head", relative=True, target="lr", groups=("head",)),
)
RATES, DECAYS, EQUAL = (0.87, 0.95, 1.05, 1.15), (0.5, 1.4, 0.8, 1.2), (1.0,) * 4


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2: the sign of an interpolation, decoupled decay."""

    def __init__(self, params, lr: float = 1e-4, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((0.9 * average + 0.1 * p.grad).sign(), alpha=-group["lr"])
                average.lerp_(p.grad, 0.01)


def muon(params, **settings):
    return torch.optim.Muon(params, **settings)


@dataclass
class Model:
    """What trains, its average and its optimizer."""

    parameters: list[torch.Tensor]
    average: list[torch.Tensor]
    optimizer: torch.optim.Optimizer

    @classmethod
    def new(cls, make: Callable, dtype: torch.dtype, *, matrices_only: bool) -> Model:
        torch.manual_seed(0)
        shapes = [(6, 16), (16, 3)] if matrices_only else [(6, 16), (16, 3), (16,)]
        parameters = [(0.5 * torch.randn(shape, dtype=dtype)).requires_grad_() for shape in shapes]
        groups = [
            {"params": [parameters[0], *parameters[2:]], "name": "body"},
            {"params": [parameters[1]], "name": "head"},
        ]
        return cls(parameters, [p.detach().clone() for p in parameters], make(groups))

    def output(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs @ self.parameters[0]
        return torch.tanh(hidden + self.parameters[2] if len(self.parameters) > 2 else hidden) @ self.parameters[1]

    def gradient(self, step: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(32, 6, generator=generator, dtype=torch.float64).to(self.parameters[0].dtype)
        loss = (self.output(inputs) - torch.sin(inputs[:, :3])).square().mean()
        return list(torch.autograd.grad(loss, self.parameters))

    def apply(self, gradient: Sequence[torch.Tensor], num_steps: int, rates: Sequence[float], decays: Sequence[float]):
        for parameter, own in zip(self.parameters, gradient, strict=True):
            parameter.grad = own.clone()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        for group, rate, decay in zip(self.optimizer.param_groups, rates, decays, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        self.optimizer.step()
        weight = averaging_weight(num_steps, WINDOW)
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.lerp_(parameter.detach(), weight)


def in_effect(values: dict[str, float], settings: dict[str, float], step: int) -> tuple[list[float], list[float]]:
    """[groups] rates, under a schedule that falls within the round, and decays."""
    rate = settings["lr"] * values["lr"] * (1.0 - 0.3 * (step - START_STEP) / STEPS)
    decay = settings["weight_decay"] * values["weight_decay"]
    return [rate, rate * values["lr:head"]], [decay, decay]


def distances(
    make,
    settings,
    rates=EQUAL,
    decays=EQUAL,
    heads=EQUAL,
    *,
    dtype=torch.float64,
    matrices_only=False,
    own_gradients=False,
):
    """For weights and averages, how far members are from their points, in shares of how far they are from the centre.

    All share the gradient that the centre has, or with ``own_gradients`` the mean of the members', each at its own
    weights. The round begins in mid-run, with momentum and an average.
    """
    model = Model.new(make, dtype, matrices_only=matrices_only)
    for step in range(START_STEP):
        model.apply(model.gradient(step), step + 1, *in_effect(dict.fromkeys(NAMES, 1.0), settings, START_STEP))
    own = [
        Genome(dict(zip(NAMES, replica_group, strict=True))) for replica_group in zip(rates, decays, heads, strict=True)
    ]
    members = [copy.deepcopy(model) for _ in own]
    line = Line.of(own, GENES, ["body", "head"])
    group_of = [0, 1, 0][: len(model.parameters)]
    points = Points(
        lambda: model.parameters,
        model.average,
        group_of=group_of,
        line=line,
        plan=PLAN,
        rules=[decay_rule(model.optimizer, group) for group in model.optimizer.param_groups],
    )
    for offset in range(STEPS):
        step = START_STEP + offset
        gradient = shared = model.gradient(step)
        if own_gradients:
            shared = [torch.stack(g).mean(dim=0) for g in zip(*(m.gradient(step) for m in members), strict=True)]
        for member, genome in zip(members, own, strict=True):
            member.apply(shared, step + 1, *in_effect(genome.values, settings, step))
        effect = in_effect(line.centre, settings, step)
        points.before_update(offset, *effect)
        model.apply(gradient, step + 1, *effect)
    return [compared(model, members, points, averaged) for averaged in (False, True)]


NAMES = [gene.name for gene in GENES]


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def compared(model: Model, members: Sequence[Model], points: Points, averaged: bool) -> float:
    centre, before = flat(model.average if averaged else model.parameters), flat(model.parameters)
    worst = 0.0
    with points.held() as write:
        for index, member in enumerate(members):
            write(index, averaged)
            real = flat(member.average if averaged else member.parameters)
            worst = max(worst, float((flat(model.parameters) - real).norm() / (real - centre).norm()))
    assert torch.equal(flat(model.parameters), before)
    return worst


def adamw(params, **settings):
    return torch.optim.AdamW(params, betas=(0.9, 0.95), **settings)


def sgd(params, **settings):
    return torch.optim.SGD(params, momentum=0.9, **settings)


def nesterov(params, **settings):
    return torch.optim.SGD(params, momentum=0.9, nesterov=True, **settings)


OPTIMIZERS = {
    "adamw": (adamw, {"lr": 3e-3, "weight_decay": 0.1}, False),
    "sgd": (sgd, {"lr": 3e-2, "weight_decay": 0.01}, False),
    "nesterov": (nesterov, {"lr": 3e-2, "weight_decay": 0.01}, False),
    "lion": (Lion, {"lr": 1e-3, "weight_decay": 0.1}, False),
    "muon": (muon, {"lr": 3e-3, "weight_decay": 0.1}, True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_decay_points_are_members_but_for_rounding(name, dtype):
    make, settings, matrices_only = OPTIMIZERS[name]
    own = {**settings, "weight_decay": 0.0}
    # Weights near 0.5 are rounded in each of forty updates, and members differ by some 0.005: 100 x 40 roundings are
    # 1e-12 and 5e-4. Seen: 4e-13 and 2e-4.
    tolerance = 1e-12 if dtype == torch.float64 else 5e-4
    heads = (1.1, 0.9, 0.95, 1.05)  # a gene per parameter group besides the one for all
    found = distances(lambda p: make(p, **own), own, RATES, EQUAL, heads, dtype=dtype, matrices_only=matrices_only)
    assert max(found) < tolerance


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("rates", "decays"),
    [(RATES, EQUAL), (EQUAL, DECAYS), (RATES, DECAYS)],
    ids=["rates", "decays", "both"],
)
def test_with_decay_what_is_missing_is_of_second_order(name, rates, decays):
    """The centre's weights stand for a member's own in the decay, which is lr x decay x steps of the update.

    With momentum m, what is taken in with the gradient counts 1 / (1 - m) times. Seen: a half to nine tenths of that.
    """
    make, settings, matrices_only = OPTIMIZERS[name]
    found = distances(lambda p: make(p, **settings), settings, rates, decays, matrices_only=matrices_only)
    built_up = 10.0 if name in ("sgd", "nesterov") else 1.0
    assert max(found) < settings["lr"] * settings["weight_decay"] * STEPS * built_up


def test_members_that_have_gradients_of_their_own_leave_the_line_at_rates_far_above_the_stable_one(record_property):
    """Curvature draws them to each other, and what the gradients' mean says of the centre is right to first order only.

    SGD with momentum 0.9 on this network turns unstable at rates of about 1. Members differ by 0.1, so that what is
    neglected is that share of what they differ by, times how much of it curvature makes in a round.
    """
    found = {}
    for rate in (1e-2, 1e-1, 3.0):
        settings = {"lr": rate, "weight_decay": 0.0}
        found[rate] = max(distances(lambda p, own=settings: sgd(p, **own), settings, RATES, own_gradients=True))
    record_property("distances", found)
    assert found[1e-2] < 0.02
    assert found[1e-1] < 0.2
    assert found[3.0] > 0.5


def line_of_rates() -> Line:
    return Line.of([Genome({"lr": rate}) for rate in (0.5, 1.5)], GENES[:1], ["0"])


def one_tensor(weight: torch.Tensor, average: torch.Tensor | None = None, **options) -> Points:
    given = {"group_of": [0], "line": line_of_rates(), "plan": PLAN, "rules": [None]}
    return Points(lambda: [weight], None if average is None else [average], **given | options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str)
def test_any_dtype_and_layout_is_written_in_place_and_restored_to_the_last_bit(dtype):
    torch.manual_seed(0)
    weight = torch.randn(4, 6).to(dtype).t()  # not contiguous
    start, place = weight.clone(), weight.data_ptr()
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    average = start.to(wide) + 1
    anchor = (start.to(wide)).lerp(average, 0.0)
    points = one_tensor(weight, average)
    weight.add_(1)
    average.add_(2)
    centre = weight.clone()
    with points.held() as write:
        write(1, False)
        expected = start.to(wide) + 1.5 * (centre.to(wide) - start.to(wide))
        torch.testing.assert_close(weight, expected.to(dtype))  # one rounding of the result
        write(0, True)
        assert (weight.to(wide) - anchor).abs().mean() < (average - anchor).abs().mean()
        assert weight.dtype == dtype and weight.data_ptr() == place and not weight.is_contiguous()
    assert torch.equal(weight, centre)


def test_sums_of_half_precision_weights_are_kept_in_single_precision():
    weight = torch.full((3,), 1.0, dtype=torch.bfloat16)
    line = Line.of([Genome({"weight_decay": value}) for value in (0.5, 1.5)], GENES[1:2], ["0"])
    points = one_tensor(weight, line=line, rules=[decay_rule(adamw([weight], weight_decay=0.1), {})])
    for offset in range(STEPS):
        points.before_update(offset, [1e-3], [1.0])  # bfloat16 holds eight bits: steps of 1e-3 would stop at 0.25
    with points.held() as write:
        write(1, False)
        assert float(weight[0]) == pytest.approx(1.0 - 0.5 * 1e-3 * STEPS, abs=4e-3)  # the weight's own rounding


def test_training_goes_on_from_a_point_and_the_centre_is_one_to_the_last_bit():
    weight, average = torch.zeros(2), torch.ones(2)
    points = one_tensor(weight, average)
    weight.add_(2)
    average.add_(1)
    points.go_on_from(line_of_rates().mixed((0.5, 0.5)))
    assert torch.equal(weight, torch.full((2,), 2.0)) and torch.equal(average, torch.full((2,), 2.0))
    points.go_on_from(line_of_rates().points[0])
    torch.testing.assert_close(weight, torch.full((2,), 1.0))
    kept = points._anchor[0]
    torch.testing.assert_close(average, kept + 0.5 * (2.0 - kept))


def test_an_observer_keeps_one_tensor_besides_the_average_and_starts_may_lie_elsewhere():
    weight, average = torch.zeros(2), torch.ones(2)
    points = one_tensor(weight, average, moves_weights=False, device=torch.device("cpu"))
    assert points._start is None and len(points._anchor) == 1
    weight.add_(2)
    with points.held() as write:
        write(1, True)
        with pytest.raises(AssertionError, match="an observer writes no weights"):
            write(1, False)
    assert torch.equal(weight, torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda p: torch.optim.AdamW(p), (0.0, 0.0, False)),
        (lambda p: torch.optim.Adam(p, decoupled_weight_decay=True), (0.0, 0.0, False)),
        (lambda p: torch.optim.Adam(p), None),
        (lambda p: torch.optim.SGD(p, momentum=0.8, dampening=0.1), (0.8, 0.1, False)),
        (lambda p: torch.optim.SGD(p, momentum=0.8, nesterov=True), (0.8, 0.0, True)),
        (Lion, (0.0, 0.0, False)),
        (lambda p: torch.optim.Adagrad(p), None),
    ],
)
def test_how_an_optimizer_applies_its_decay(make, rule):
    optimizer = make([torch.zeros(2, 2, requires_grad=True)])
    found = decay_rule(optimizer, optimizer.param_groups[0])
    assert (None if found is None else (found.momentum, found.dampening, found.nesterov)) == rule
