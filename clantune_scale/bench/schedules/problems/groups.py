"""The study's tasks with several parameter groups, and starts at which each group would need a factor of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clantune_scale.bench.schedules.problem import Problem, Start

#: By task, the group of each parameter: what reads the input, matrices between, what makes the output.
GROUP_OF: Mapping[str, Sequence[str]] = {
    "digits-mlp-adamw": ("emb", "emb", "out", "out"),
    "digits-mlp-sgd": ("emb", "emb", "out", "out"),
    "digits-cnn-sgd": ("emb", "emb", "mat", "mat", "out", "out"),
    "regression-adamw": ("emb", "emb", "mat", "mat", "out", "out"),
    "regression-sgd": ("emb", "emb", "mat", "mat", "out", "out"),
    "bytes-mlp-adamw": ("emb", "mat", "mat", "out", "out"),
}
#: By start, what groups' learning rates are times the best constant one.
_FACTORS: Mapping[str, Mapping[str, float]] = {
    "all 1x": {},
    "all 0.1x": {"emb": 0.1, "mat": 0.1, "out": 0.1},
    "all 10x": {"emb": 10.0, "mat": 10.0, "out": 10.0},
    "emb 0.03x": {"emb": 0.03},
    "emb 10x": {"emb": 10.0},
    "out 0.03x": {"out": 0.03},
    "out 10x": {"out": 10.0},
    "emb 10x, out 0.1x": {"emb": 10.0, "out": 0.1},
    "emb 0.03x, out 3x": {"emb": 0.03, "out": 3.0},
}


def grouped(problem: Problem) -> Problem:
    """The task in groups; its oracle is the task's own, one learning rate for all groups."""
    groups = GROUP_OF[problem.name]
    starts = tuple(
        Start(name, 1.0, {"group_rates": {group: factor for group, factor in factors.items() if group in groups}})
        for name, factors in _FACTORS.items()
    )
    return problem.variant(f"{problem.name}, groups", group_of=groups, starts=starts)
