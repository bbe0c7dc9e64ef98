"""The benchmark's result as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clantune_scale.bench.schedules import missing
from clantune_scale.bench.schedules.records import finite
from clantune_scale.bench.schedules.scores import NEARLY_SOLVED, SOLVED, ReferenceLosses, Score
from clantune_scale.bench.schedules.trial import Trial


@dataclass(frozen=True)
class Result:
    """What one call of the benchmark measured.

    Attributes:
        seeds: of all runs.
        is_report: whether these are the reporting seeds.
        references: [problems].
        trials: [methods][problems].
        left_out: why problems were left out.
    """

    seeds: tuple[int, ...]
    is_report: bool
    references: tuple[ReferenceLosses, ...]
    trials: tuple[tuple[Trial, ...], ...]
    left_out: tuple[str, ...] = ()

    @property
    def scores(self) -> list[Score]:
        return [Score.of(trials, self.references) for trials in self.trials]

    @property
    def figures(self) -> dict[str, list[missing.StartFigures]]:
        """By method, what is missing from every start of every problem."""
        return {
            trials[0].method: [
                own
                for trial, reference in zip(trials, self.references, strict=True)
                for own in missing.figures_of(trial, reference)
            ]
            for trials in self.trials
        }

    def to_markdown(self) -> str:
        """The table of methods, and one of S1 by problem and start."""
        kind = "reporting" if self.is_report else "tuning"
        seeds = ", ".join(map(str, self.seeds))
        names = ", ".join(reference.problem for reference in self.references)
        head = [f"{len(self.references)} problems ({names}), {kind} seeds {seeds}.", ""]
        head += [f"Left out: {reason}" for reason in self.left_out] + [""] * bool(self.left_out)
        by_kind = _markdown(missing.COLUMNS, missing.rows(self.figures))
        missed = _markdown(*missing.rows_by_problem(self.figures))
        tables = [*_summary(self.scores, self._starts()), "", *by_kind, "", *missed, "", *_by_problem(self)]
        return "\n".join([*head, *tables, "", FOOTNOTE, ""])

    def to_json(self) -> dict[str, Any]:
        """Everything: every run's loss, cost and rates, besides the numbers of the table; null for what diverged."""
        record = {
            "schema": 3,
            "seeds": list(self.seeds),
            "is_report": self.is_report,
            "references": [asdict(reference) for reference in self.references],
            "left_out": list(self.left_out),
            "scores": [asdict(score) for score in self.scores],
            "figures": {name: [asdict(own) for own in figures] for name, figures in self.figures.items()},
            "trials": [[asdict(trial) for trial in trials] for trials in self.trials],
        }
        return finite(record)

    def _starts(self) -> list[str]:
        """Names of the starts, if all problems have the same."""
        names = {reference.starts for reference in self.references}
        return list(names.pop()) if len(names) == 1 else []


FOOTNOTE = (
    "S1 = (default - loss) / (default - oracle), on test data, means over seeds and their standard error; solved at "
    "0.9. With room: the starts that the oracle beats by more than two standard errors (over seeds, paired). "
    "Otherwise S1 is a ratio of noises, in brackets. Harmed: S1 below -0.05; in brackets those more than "
    "two standard errors worse than their default. Step efficiency: the share of the run in which the oracle's "
    "schedule gets as far. Gap: the distance to the oracle, in shares of its progress. Cost: gradient evaluations "
    "in plain runs, a sample's loss counted as a third of one; evaluations that decide count, those that are only "
    "for the record do not. Missing: (loss - oracle) / (initial loss - oracle), at most 100 %. Harm: what is missing "
    "more than as configured, seed by seed. Worse and better: by more than 0.5 % and two standard errors over seeds. "
    "By problem: as configured, then by method. Excess loss: over the oracle's, median. Down at what was configured: "
    "the share of the run after which the validation loss stays at or below what the start kept as it is ends with, "
    "median, with 0.5 % of the progress as slack."
)


def _summary(scores: Sequence[Score], starts: Sequence[str]) -> list[str]:
    columns = ["method", f"solved at {SOLVED}", "with room", f"at {NEARLY_SOLVED}", "mean S1"]
    columns += [f"median {name}" for name in starts]
    columns += ["harmed", "step efficiency", "gap", "cost", "CPU s a run"]
    return _markdown(columns, [_summary_row(score, len(starts)) for score in scores])


def _summary_row(score: Score, num_starts: int) -> list[str]:
    return [
        score.method,
        f"{score.num_at_least(SOLVED)} of {score.num_cases}",
        f"{score.num_solved_with_room} of {score.num_with_room}",
        str(score.num_at_least(NEARLY_SOLVED)),
        f"{score.mean_s1:.2f}",
        *(_s1(score.median_s1(start)) for start in range(num_starts)),
        f"{score.num_harmed} ({score.num_harmed_beyond_noise})",
        f"{score.mean_step_efficiency:.2f}",
        f"{score.mean_gap:.3f}",
        f"{score.mean_cost:.2f}",
        f"{score.cpu_s:.2f}",
    ]


def _by_problem(result: Result) -> list[str]:
    columns = ["S1 by start", *(score.method for score in result.scores)]
    rows = [
        [reference.problem, *(_starts(score, index) for score in result.scores)]
        for index, reference in enumerate(result.references)
    ]
    return _markdown(columns, rows)


def _starts(score: Score, problem: int) -> str:
    """Every start's S1 with its standard error, in brackets if there was no room."""
    cells = []
    for s1, error, room in zip(score.s1[problem], score.s1_errors[problem], score.has_room[problem], strict=True):
        cell = _s1(s1) + (f"±{error:.2f}" if math.isfinite(error) and s1 > -10 else "")
        cells.append(cell if room else f"({cell})")
    return " ".join(cells)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def _s1(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) and value > -10 else "<-10"
