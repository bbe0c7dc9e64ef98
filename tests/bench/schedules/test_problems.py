from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.nn import functional

from clantune_scale.bench.schedules import curves
from clantune_scale.bench.schedules.problem import stream
from clantune_scale.bench.schedules.suite import ALL
from clantune_scale.errors import ConfigError


@functools.cache
def problem_of(name: str):
    try:
        return ALL[name]()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ALL)
def test_a_problem_is_a_pure_function_whose_models_do_not_meet(name):
    problem = problem_of(name)
    models = [problem.init(seed) for seed in (0, 1)]
    first, again, other = (problem.batch(0, step, 0) for step in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert {len(column) for column in first} == {problem.batch_size}
    together = problem.losses(
        [torch.stack(same) for same in zip(*models, strict=True)],
        [torch.stack([a, b]) for a, b in zip(first, other, strict=True)],
        {},
    )
    for model, batch, losses in zip(models, (first, other), together, strict=True):
        alone = problem.losses([p.unsqueeze(0) for p in model], [x.unsqueeze(0) for x in batch], {})
        torch.testing.assert_close(losses, alone[0], rtol=1e-4, atol=1e-5)  # float32, another order of summation


@pytest.mark.parametrize("name", ALL)
def test_training_validation_and_test_data_are_apart(name):
    problem = problem_of(name)
    parameters = [p.unsqueeze(0) for p in problem.init(0)]
    losses = [
        float(problem.losses(parameters, [x.unsqueeze(0) for x in part], {}).mean())
        for part in (problem.validation, problem.test)
    ]
    assert all(math.isfinite(loss) for loss in losses)
    assert len(problem.validation[0]) <= 256
    assert not torch.equal(problem.validation[0][:1], problem.test[0][:1])


def test_a_convolution_is_what_torch_says_it_is():
    problem = problem_of("digits-cnn-sgd")
    parameters, (pixels, labels) = problem.init(0), problem.batch(0, 0, 0)
    hidden = functional.pad(pixels.view(-1, 1, 8, 8), (1, 0, 1, 0))
    hidden = functional.conv2d(hidden, parameters[0].T.reshape(8, 1, 3, 3), parameters[1], stride=2).relu()
    kernel = parameters[2].view(3, 3, 8, 12).permute(3, 2, 0, 1)
    hidden = functional.conv2d(functional.pad(hidden, (1, 0, 1, 0)), kernel, parameters[3], stride=2).relu()
    logits = hidden.permute(0, 2, 3, 1).flatten(1) @ parameters[4] + parameters[5]
    expected = functional.cross_entropy(logits, labels, reduction="none")
    losses = problem.losses([p.unsqueeze(0) for p in parameters], [pixels[None], labels[None]], {})
    torch.testing.assert_close(losses[0], expected, rtol=1e-4, atol=1e-5)  # float32


def test_the_transformer_is_what_torch_says_it_is():
    problem = problem_of("bytes-transformer-adamw")
    p, (window,) = problem.init(0), problem.batch(0, 0, 0)

    def normed(x):
        return functional.layer_norm(x, (24,))

    x = p[0][window[:, :-1]] + p[1]
    query, key, value = (normed(x) @ p[2] + p[3]).view(8, 16, 3, 2, 12).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    x = x + mixed.transpose(1, 2).flatten(2) @ p[4] + p[5]
    x = x + (normed(x) @ p[6] + p[7]).relu() @ p[8] + p[9]
    logits = normed(x) @ p[10] + p[11]
    expected = functional.cross_entropy(logits.mT, window[:, 1:], reduction="none").mean(dim=1)
    losses = problem.losses([parameter.unsqueeze(0) for parameter in p], [window.unsqueeze(0)], {})
    torch.testing.assert_close(losses[0], expected, rtol=1e-4, atol=1e-5)  # float32


def test_streams_differ_in_every_argument():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)]
    draws = {float(torch.rand(1, generator=stream(*key))) for key in keys}
    assert len(draws) == len(keys)


def test_curves_are_what_they_are_called():
    assert [curves.over("linear", 10)(step) for step in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    assert curves.over("cosine", 100)(50) == pytest.approx(0.5)
    warmed = curves.over("warmup-linear", 100)
    assert [warmed(step) for step in (0, 4, 5)] == pytest.approx([0.0, 0.8, 1.0])
    assert warmed(99) == pytest.approx(0.01 / 0.95)
    assert curves.over("wsd", 100)(60) == 1.0
    assert curves.over("wsd", 100)(95) == pytest.approx(0.05 / 0.95 / 0.2)
    assert curves.over("inverse-sqrt", 100)(20) == pytest.approx(0.5)


def test_digits_say_what_they_need(monkeypatch):
    from clantune_scale.bench.schedules.problems import digits

    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="need scikit-learn"):
        digits.digits.__wrapped__()
