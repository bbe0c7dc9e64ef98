"""Pictures of the learning rates that methods chose beside the oracle's, and of what is missing from every start."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from clantune_scale.bench.schedules import curves
from clantune_scale.bench.schedules.missing import StartFigures
from clantune_scale.bench.schedules.oracle import Oracle
from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.bench.schedules.trial import Trial

# Okabe and Ito's palette.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_POINTS = 200


def draw_rates(trial: Trial, problem: Problem, oracle: Oracle, path: Path) -> Path:
    """Every run's learning rate over the steps, coloured by start, and the oracle's; writes a PNG."""
    # The object interface does not touch pyplot's state. Matplotlib takes a second to import, so it is imported here.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (start, runs) in enumerate(zip(problem.starts, trial.runs, strict=True)):
        for number, run in enumerate(runs):
            label = start.name if number == 0 else None
            axes.plot(*zip(*run.rates, strict=True), color=_COLORS[index % len(_COLORS)], alpha=0.6, label=label)
    axes.plot(*_oracle_rates(oracle, problem.total_steps), color="black", linestyle="--", label="oracle")
    axes.set(xlabel="optimizer steps", ylabel="learning rate", yscale="log", title=f"{trial.problem}: {trial.method}")
    axes.set_ylim(bottom=1e-3 * oracle.best.rate)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=3)
    figure.savefig(path, dpi=110)
    return path


def draw_missing(methods: Mapping[str, Sequence[StartFigures]], path: Path) -> Path:
    """What is missing from every start, as configured and with each method, grouped by kind; writes a PNG.

    Args:
        methods: by name, the figures of all starts, in one order.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(methods.values()))
    kinds = dict.fromkeys(own.kind for own in first)
    order = sorted(range(len(first)), key=lambda i: (list(kinds).index(first[i].kind), _share(first[i].configured)))
    figure = Figure(figsize=(7, 1.6 + 0.14 * len(first)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = range(len(order))
    configured = [_share(first[i].configured) for i in order]
    shares = {name: [_share(own[i].missing) for i in order] for name, own in methods.items()}
    shown = {name: values for name, values in shares.items() if values != configured}  # the starts kept as they are
    for row, values in enumerate(zip(configured, *shown.values(), strict=True)):
        axes.plot([min(values), max(values)], [row, row], color="0.85", zorder=1)
    axes.scatter(configured, rows, marker="|", s=40, color="black", label="as configured", zorder=2)
    for color, (name, own) in zip(_COLORS, shown.items(), strict=False):
        axes.scatter(own, rows, s=12, color=color, alpha=0.8, label=name, zorder=3)
    axes.set_yticks(rows, [f"{first[i].problem.partition(';')[0]}, {first[i].start}" for i in order], fontsize=5)
    for row in range(1, len(order)):
        if first[order[row]].kind != first[order[row - 1]].kind:
            axes.axhline(row - 0.5, color="0.5", linewidth=0.6)
    for kind in kinds:
        place = next(row for row in rows if first[order[row]].kind == kind)
        axes.text(1.01, place, kind, transform=axes.get_yaxis_transform(), fontsize=7, va="bottom")
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set(xlabel="missing, % of the oracle's progress", ylim=(-1, len(order)))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", ncols=len(shown) + 1, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=130)
    return path


def _share(of_seeds: Sequence[float]) -> float:
    """The mean over seeds in percent."""
    return 100 * statistics.fmean(of_seeds)


def _oracle_rates(oracle: Oracle, total_steps: int) -> tuple[Sequence[float], Sequence[float]]:
    schedule = curves.over(oracle.best.schedule, total_steps)
    steps = [total_steps * i // _POINTS for i in range(_POINTS)]
    return steps, [oracle.best.rate * schedule(step) for step in steps]
