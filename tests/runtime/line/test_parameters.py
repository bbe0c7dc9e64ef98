"""Parameters that are frozen, unfrozen or added while a clan is on, and gradients that a loop still holds."""

from __future__ import annotations

import pytest
import torch

from clantune_scale.core.line import averaging_weight
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.errors import ConfigError
from tests.runtime.line.test_optimizers import Net, attach, data, train

#: Rounds of five members that differ in both.
BOTH = {"genes": {"lr": {}, "weight_decay": {}}, "population_size": 5}
NO_TRIAL = {"strategy": {"name": "clan", "options": {"trial_cost": 0}}}


def all_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Over every parameter, frozen ones among them."""
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)


def step_by_hand(clan, model, optimizer, batch) -> None:
    model(*batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def batches():
    return list(torch.utils.data.DataLoader(data(), 8))


def test_a_parameter_that_is_unfrozen_later_is_refused_before_its_first_update(tmp_path):
    model = Net()
    optimizer = all_of(model)
    clan = attach(tmp_path, model, optimizer)
    train(clan, model, [optimizer], [], 3)
    before = model.frozen.weight.detach().clone()
    model.frozen.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"frozen.weight \(and 1 more\) has a gradient, and was frozen.*attach"):
        train(clan, model, [optimizer], [], 4)
    assert torch.equal(model.frozen.weight, before) and clan.num_steps == 3


def test_a_parameter_group_that_is_added_later_is_refused_before_its_first_update(tmp_path):
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    clan = attach(tmp_path, model, optimizer)
    train(clan, model, [optimizer], [], 3)
    optimizer.add_param_group({"params": list(model.frozen.requires_grad_(True).parameters())})
    with pytest.raises(ConfigError, match=r"frozen.weight \(and 1 more\)"):
        train(clan, model, [optimizer], [], 4)
    model.shift = torch.nn.Parameter(torch.zeros(1))
    model.shift.grad = torch.ones(1)
    optimizer.add_param_group({"params": [model.shift]})
    model.frozen.requires_grad_(False)
    optimizer.zero_grad()
    model.shift.grad = torch.ones(1)
    with pytest.raises(ConfigError, match=r"a tensor of shape \[1\] has a gradient, and was .*not in the optimizer"):
        optimizer.step()


def test_a_group_that_is_added_later_is_refused_even_if_nothing_in_it_trains(tmp_path):
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    clan = attach(tmp_path, model, optimizer)
    optimizer.add_param_group({"params": list(model.frozen.parameters())})
    with pytest.raises(ConfigError, match="has 2 parameter groups and had 1 when the clan was attached"):
        train(clan, model, [optimizer], [], 1)


@pytest.mark.parametrize("store", ["device", "host"])
def test_points_of_a_parameter_that_is_frozen_and_unfrozen_follow_the_formula(store, tmp_path):
    """It trains for two steps, stands still for two and trains in the last; a decay acts in its own steps only."""
    model = Net()
    optimizer = all_of(model)
    walked, rates = [], []
    optimizer.register_step_post_hook(lambda *_: walked.append(model.out.weight.detach().clone()))
    clan = attach(tmp_path, model, optimizer, line={"store": store}, **NO_TRIAL, **BOTH)
    line, plan = clan.members._line, clan.phases.position.plan
    start = model.out.weight.detach().clone()
    seen, inner = [], clan.measurement.losses

    def losses(window=None):
        seen.append(model.out.weight.detach().clone())
        return inner(window)

    clan.measurement.losses = losses
    given, decays = batches(), []
    for number in range(5):
        model.out.weight.requires_grad_(number not in (2, 3))
        if number in (2, 3):
            model.out.weight.grad = None
        decays.append(model.out.weight.detach().clone())
        rates.append(optimizer.param_groups[0]["lr"] * line.centre["lr"])
        step_by_hand(clan, model, optimizer, given[number])
        if number in (2, 3):
            assert torch.equal(walked[-1], walked[1])
    assert plan.end_step == 5 and plan.uses_ema and line.varies_rate and line.varies_decay
    assert len(seen) == len(set(line.points)) > 2
    average, share = start.clone(), 1.0
    left = []
    for number, own in enumerate(walked, start=1):
        weight = averaging_weight(number, plan.ema_window_steps)
        left = [one * (1 - weight) for one in left] + [weight]
        average.lerp_(own, weight)
        share *= 1 - weight
    # What each step's decay has come to in the average, by the shares of the weights after it and later.
    reach = [sum(left[number:]) for number in range(5)]
    for point, found in zip(dict.fromkeys(line.points), seen, strict=True):
        decay = sum(
            reach[number] * rates[number] * 0.5 * line.centre["weight_decay"] * decays[number] for number in (0, 1, 4)
        )
        wanted = average + (point.rates[0] - 1) * (average - start) - point.decays[0] * decay
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_turns_hold_a_parameter_that_is_frozen_during_them(tmp_path):
    """A part is frozen from the trial on. All turns leave it, and the state of its optimizer, as they were."""
    model = Net()
    optimizer = all_of(model)
    clan = attach(tmp_path, model, optimizer)
    held = None
    for step in clan.steps(clan.loader(data()), until=50):
        position = clan.phases.position
        if position.phase.kind is PhaseKind.COMPETITIVE and held is None:
            model.hidden.requires_grad_(False)
            held = model.hidden.weight.detach().clone(), optimizer.state[model.hidden.weight]["exp_avg"].clone()
        for batch in step:
            model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert held is not None and clan.num_steps == 50
    assert torch.equal(model.hidden.weight, held[0])
    assert torch.equal(optimizer.state[model.hidden.weight]["exp_avg"], held[1])
    assert any(len(set(record.losses)) == 4 for record in clan.progress.lineage)


@pytest.mark.parametrize("store", ["device", "host"])
def test_a_measurement_leaves_the_loops_gradients_to_the_last_bit(store, tmp_path):
    model = Net()
    optimizer = all_of(model)
    given = {}
    optimizer.register_step_pre_hook(
        lambda *_: given.update({n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.requires_grad})
    )
    clan = attach(tmp_path, model, optimizer, line={"store": store}, **NO_TRIAL)
    for number, batch in enumerate(batches()[:5]):
        model(*batch).backward()
        optimizer.step()  # the fifth ends a round, inside this call
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                own, copy = given[name]
                assert parameter.grad is own and torch.equal(own, copy)
        if number < 4:
            optimizer.zero_grad()
    assert len(clan.progress.lineage) == 1 and len(set(clan.progress.lineage[0].losses)) == 4


def test_a_loop_may_drop_its_gradients_before_a_round_ends(tmp_path):
    model = Net()
    optimizer = all_of(model)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    clan = attach(tmp_path, model, optimizer, **NO_TRIAL)
    alive, inner = [], clan.measurement.losses

    def losses(window=None):
        alive.append([p.grad for p in model.parameters() if p.grad is not None])
        return inner(window)

    clan.measurement.losses = losses
    for batch in batches()[:5]:
        model(*batch).backward()
        optimizer.step()
    assert alive == [[]] * 4 and len(clan.progress.lineage) == 1
