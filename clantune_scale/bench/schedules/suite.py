"""The problems by name, and how to bring others."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.bench.schedules.problems import groups, kinds
from clantune_scale.bench.schedules.problems.bytes import BytesPerceptron, BytesTransformer
from clantune_scale.bench.schedules.problems.digits import DigitsConvolution, DigitsPerceptron
from clantune_scale.bench.schedules.problems.quadratic import Quadratic
from clantune_scale.bench.schedules.problems.regression import Regression
from clantune_scale.core.spelling import did_you_mean
from clantune_scale.errors import ConfigError

#: The study's nine tasks, the last two never tuned on.
STUDY: dict[str, Callable[[], Problem]] = {
    "quadratic-sgd": Quadratic,
    "regression-adamw": partial(Regression, "adamw"),
    "regression-sgd": partial(Regression, "sgd"),
    "digits-mlp-adamw": partial(DigitsPerceptron, "adamw"),
    "digits-mlp-sgd": partial(DigitsPerceptron, "sgd"),
    "bytes-mlp-adamw": partial(BytesPerceptron, "adamw"),
    "bytes-mlp-sgd": partial(BytesPerceptron, "sgd"),
    "digits-cnn-sgd": partial(DigitsConvolution, "sgd"),
    "bytes-transformer-adamw": BytesTransformer,
}

_DIGITS, _BYTES, _REGRESSION = STUDY["digits-mlp-adamw"], STUDY["bytes-mlp-adamw"], STUDY["regression-adamw"]

#: Problems that differ from the study's in kind.
KINDS: dict[str, Callable[[], Problem]] = {
    "warmup-cosine": lambda: kinds.scheduled(_BYTES(), "warmup-cosine"),
    "wsd": lambda: kinds.scheduled(_DIGITS(), "wsd"),
    "inverse-sqrt": lambda: kinds.scheduled(_REGRESSION(), "inverse-sqrt"),
    "wrong-weight-decay": lambda: kinds.wrong_weight_decay(_BYTES()),
    "wrong-beta1": lambda: kinds.wrong_momentum(_DIGITS()),
    "wrong-momentum": lambda: kinds.wrong_momentum(STUDY["regression-sgd"]()),
    "wrong-clip": lambda: kinds.wrong_clip(STUDY["bytes-mlp-sgd"]()),
    "small-accumulation": lambda: kinds.accumulated(STUDY["bytes-mlp-sgd"](), 1 / 4),
    "large-accumulation": lambda: kinds.accumulated(_DIGITS(), 4),
    "dropout": lambda: kinds.Dropout("adamw"),
    "label-noise": lambda: kinds.NoisyLabels("sgd"),
    "shift": lambda: kinds.Shift("adamw"),
    "unknown-length": lambda: kinds.endless(_BYTES()),
    "longer-3": lambda: kinds.longer(_REGRESSION(), 3),
    "far-too-small": lambda: kinds.far_too_small(BytesTransformer(), 1500),
    "longer-10": lambda: kinds.longer(Quadratic(), 10),
}
#: Tasks of the study with several parameter groups. They are no part of ``all``.
GROUPED: dict[str, Callable[[], Problem]] = {
    f"{name}-groups": partial(lambda task: groups.grouped(STUDY[task]()), name) for name in groups.GROUP_OF
}
ALL = {**STUDY, **KINDS}
#: The name that stands for problems that are drawn.
GENERATED = "generated"
SETS = {"study": list(STUDY), "small": list(STUDY)[:7], "kinds": list(KINDS), "groups": list(GROUPED), "all": list(ALL)}
_KNOWN = {**ALL, **GROUPED}


def load(names: Sequence[str]) -> list[Problem]:
    """The problems of these names: single ones, sets of them, or ``module:NAME`` of one's own.

    Raises:
        ConfigError: for a name that is none of these.
    """
    problems: list[Problem] = []
    for name in names:
        if name == GENERATED:
            raise ConfigError(
                f"{GENERATED!r} stands for drawn problems, which only python -m clantune_scale.bench.schedules draws. "
                f"Name one of: {', '.join([*SETS, *ALL])}, or module:NAME."
            )
        if name in SETS:
            problems += [_KNOWN[member]() for member in SETS[name]]
        elif name in _KNOWN:
            problems.append(_KNOWN[name]())
        else:
            problems += _imported(name)
    return problems


def _imported(name: str) -> list[Problem]:
    module, colon, attribute = name.partition(":")
    if not colon:
        known = [*SETS, GENERATED, *_KNOWN]
        hint = did_you_mean(name, known) or f" Choose from: {', '.join(known)}."
        raise ConfigError(f"no problem is called {name!r}.{hint} One of your own is named module:NAME.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"problem {name!r} cannot be imported: {error}. Give module:NAME.") from error
    problems = list(found) if isinstance(found, Iterable) else [found]
    if not problems or not all(isinstance(problem, Problem) for problem in problems):
        raise ConfigError(f"{name!r} is {found!r}. Make it a Problem, or a list of them.")
    return problems
