"""Pictures of the learning rates that methods chose, and of the oracle's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clantune_scale.bench.schedules import curves
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


def _oracle_rates(oracle: Oracle, total_steps: int) -> tuple[Sequence[float], Sequence[float]]:
    schedule = curves.over(oracle.best.schedule, total_steps)
    steps = [total_steps * i // _POINTS for i in range(_POINTS)]
    return steps, [oracle.best.rate * schedule(step) for step in steps]
