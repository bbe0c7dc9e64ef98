"""The families that come with the benchmark, and their split."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from clantune_scale.bench.batched import OPTIMIZERS
from clantune_scale.bench.schedules import curves
from clantune_scale.bench.schedules.families import generator, split
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.registry import (
    OPTIMIZER_FAMILIES,
    SCHEDULES,
    TASKS,
    OptimizerFamily,
    ScheduleFamily,
    TaskFamily,
    register,
)
from clantune_scale.bench.schedules.families.tasks.plateaus import ModularSum
from clantune_scale.errors import ConfigError
from tests.bench.schedules import plugin_families

BUILT_IN = {name: side for name, side in split.sides().items() if "/test " not in name}
NAMES = [family.name for family in TASKS if not family.name.startswith("test ")]
assert generator.BUILT_IN and plugin_families.CURVATURE is not None


def drawn(name: str, seed: int = 0):
    try:
        return TASKS[name].draw(Draw("test", seed, name))
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_a_pure_function_whose_models_do_not_meet(name):
    task, twin = drawn(name), drawn(name)
    models = [task.init(seed) for seed in (0, 1)]
    first, again, other = task.batch(0, 3, 0), twin.batch(0, 3, 0), task.batch(0, 4, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(models[0], twin.init(0), strict=True))
    assert not torch.equal(first[0], other[0])
    assert {len(column) for column in first} == {task.batch_size} and task.batch_size % 8 == 0
    together = task.losses(
        [torch.stack(same) for same in zip(*models, strict=True)],
        [torch.stack([a, b]) for a, b in zip(first, other, strict=True)],
        {},
    )
    assert together.shape == (2, task.batch_size)
    for model, batch, losses in zip(models, (first, other), together, strict=True):
        alone = task.losses([p.unsqueeze(0) for p in model], [x.unsqueeze(0) for x in batch], {})
        torch.testing.assert_close(losses, alone[0], rtol=1e-4, atol=1e-5)  # float32, another order of summation


@pytest.mark.parametrize("name", NAMES)
def test_a_task_has_data_apart_and_losses_that_a_gradient_lowers(name):
    task = drawn(name, seed=1)
    assert 16 <= len(task.validation[0]) <= 256 and not torch.equal(task.validation[0][:1], task.test[0][:1])
    parameters = [p.unsqueeze(0).requires_grad_() for p in task.init(0)]
    samples = [x.unsqueeze(0) for x in task.batch(0, 0, 0)]
    loss = task.losses(parameters, samples, {}).mean()
    gradients = torch.autograd.grad(loss, parameters)
    # Less than any curvature here needs, and enough to be seen in float32.
    rate = 1e-3 / max(1.0, *(float(gradient.norm()) for gradient in gradients))
    loss = loss.detach()
    with torch.no_grad():
        moved = [p - rate * gradient for p, gradient in zip(parameters, gradients, strict=True)]
        after = task.losses(moved, samples, {}).mean()
        held_out = [
            float(task.losses(moved, [x.unsqueeze(0) for x in part], {}).mean())
            for part in (task.validation, task.test)
        ]
    assert float(after) < float(loss) and all(map(math.isfinite, held_out))


def test_the_held_out_pairs_of_a_modular_sum_are_not_trained_on():
    task = ModularSum(Draw("pairs"))
    trained = {tuple(pair) for step in range(60) for pair in task.batch(0, step, 0)[0].tolist()}
    held_out = [{tuple(pair) for pair in part[0].tolist()} for part in (task.validation, task.test)]
    assert not trained & (held_out[0] | held_out[1]) and not held_out[0] & held_out[1]


def test_a_run_that_continues_starts_from_a_trained_state():
    task = drawn("continued regression")
    begun, fresh = task.init(0), task._before.init(0)
    examples = [column.unsqueeze(0) for column in task._before.validation]
    losses = [float(task.losses([p.unsqueeze(0) for p in own], examples, {}).mean()) for own in (begun, fresh)]
    assert losses[0] < 0.5 * losses[1]
    begun[0].zero_()
    assert not torch.equal(task.init(0)[0], begun[0])  # what was trained is not given away


@pytest.mark.parametrize("family", list(SCHEDULES), ids=lambda family: family.name)
def test_a_schedule_lies_between_its_floor_and_one(family):
    for warmup in family.warmups:
        for floor in family.floors:
            factors = [curves.over(family.variant(warmup, floor), 400)(step) for step in range(400)]
            assert all(0 <= factor <= 1 for factor in factors) and max(factors) > 0.9
            assert min(factors[int(400 * warmup) + 1 :]) >= floor - 1e-9
            assert warmup == 0 or factors[0] == 0.0


def test_optimizers_name_rules_and_hyperparameters_that_there_are():
    for family in OPTIMIZER_FAMILIES:
        settings = family.settings(Draw("test"))
        assert settings.optimizer in OPTIMIZERS and settings.weight_decay in family.weight_decays
        assert family.momentum is None or family.momentum in OPTIMIZERS[family.optimizer].defaults


def test_every_family_is_on_one_side_and_stays_there():
    by_side = {side: {name for name, own in BUILT_IN.items() if own == side} for side in ("tuning", "reporting")}
    assert not by_side["tuning"] & by_side["reporting"]
    for kind, count in (("task", 28), ("optimizer", 13), ("schedule", 12)):
        reported = [name for name in by_side["reporting"] if name.startswith(f"{kind}/")]
        assert sum(name.startswith(f"{kind}/") for name in BUILT_IN) == count
        assert 0.35 <= len(reported) / count <= 0.5
    assert BUILT_IN["task/suite"] == "tuning"  # the strategy was built on it
    said = "\n".join(f"{name} {side}" for name, side in sorted(BUILT_IN.items()))
    # Whoever changes this moves what was tuned on to the side of what is reported, or back.
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "4c7dff985e17c24a"


def test_a_family_that_is_added_moves_no_other(monkeypatch):
    before = split.sides()
    monkeypatch.setattr(TASKS, "_families", dict(TASKS._families))
    register(TaskFamily("test another", plugin_families.Bowl))
    after = split.sides()
    assert {name: side for name, side in after.items() if name != "task/test another"} == before


def test_a_name_that_is_taken_and_a_rule_that_is_not_there_are_refused():
    with pytest.raises(ConfigError, match="a family of tasks 'parity' already"):
        register(TaskFamily("parity", plugin_families.Bowl))
    with pytest.raises(ConfigError, match="'signum', which is not there"):
        register(OptimizerFamily("test signum", "signum", (-4.0, 0.0)))
    with pytest.raises(ConfigError, match="a family of schedules 'cosine' already"):
        register(ScheduleFamily("cosine", curves.cosine))
    with pytest.raises(ConfigError, match=r"'partiy'. Did you mean 'parity'\?"):
        TASKS["partiy"]
