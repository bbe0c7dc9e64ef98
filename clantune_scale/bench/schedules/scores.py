"""From test losses to scores: how much of what a schedule can gain a method gained."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clantune_scale.bench.schedules.noise import has_room, is_worse, s1_error
from clantune_scale.bench.schedules.trial import Trial

#: Share of the whole progress below which start and oracle are as good: nothing is there to be gained.
MIN_GAP = 1e-3
SOLVED, NEARLY_SOLVED = 0.9, 0.8
#: Below this a run is worse than its own default by more than noise.
HARMED = -0.05


@dataclass(frozen=True)
class ReferenceLosses:
    """What runs on a problem are measured against, all with the same seeds.

    Attributes:
        problem: its name.
        starts: their names.
        default_losses: [starts], the start kept as it is.
        oracle_loss: of the oracle's schedule.
        initial_loss: before training.
        losses_by_share: the oracle's in a part of the run, by its share; from the grid's seeds.
        default_runs: [starts][seeds], of which ``default_losses`` are the means.
        oracle_runs: [seeds], likewise.
        kinds: [starts], what they are grouped by.
        default_validation: [starts][seeds], the loss on the window at the end of the start kept as it is.
    """

    problem: str
    starts: tuple[str, ...]
    default_losses: tuple[float, ...]
    oracle_loss: float
    initial_loss: float
    losses_by_share: Mapping[float, float]
    default_runs: tuple[tuple[float, ...], ...] = ()
    oracle_runs: tuple[float, ...] = ()
    kinds: tuple[str, ...] = ()
    default_validation: tuple[tuple[float, ...], ...] = ()

    def s1(self, start: int, loss: float) -> float:
        """(L_default - L) / (L_default - L_oracle).

        If the start is as good as the oracle, to a thousandth of the whole progress, that thousandth stands for the
        difference, so that chance does not decide. 1 if both diverge.
        """
        default, least = self.default_losses[start], MIN_GAP * (self.initial_loss - self.oracle_loss)
        if not math.isfinite(default):
            return 0.0 if not math.isfinite(loss) else 1.0 if loss <= self.initial_loss else -1.0
        if default - self.oracle_loss < least:
            return 1.0 - (loss - min(default, self.oracle_loss)) / least if math.isfinite(loss) else -math.inf
        return (default - loss) / (default - self.oracle_loss)

    def has_room(self, start: int) -> bool:
        """Whether there is more to gain from this start than noise over the seeds; see ``noise.has_room``."""
        if not self.default_runs or not math.isfinite(self.default_losses[start]):
            return True
        return has_room(self.default_runs[start], self.oracle_runs)

    def s1_error(self, start: int, losses: Sequence[float]) -> float:
        """Standard error of S1 over seeds, of ``losses`` [seeds]; nan if runs are not known one by one."""
        return s1_error(losses, self.default_runs[start], self.oracle_runs) if self.default_runs else math.nan

    def is_worse(self, start: int, losses: Sequence[float]) -> bool:
        """Whether ``losses`` [seeds] are worse than the start kept as it is by more than noise."""
        return not self.default_runs or is_worse(losses, self.default_runs[start])

    def gap(self, loss: float) -> float:
        """The distance to the oracle, as a share of its whole progress."""
        return (loss - self.oracle_loss) / (self.initial_loss - self.oracle_loss)

    def step_efficiency(self, loss: float) -> float:
        """Share of the run in which the oracle's schedule reaches ``loss``, between the shares that were tried.

        The least share tried stands for all below it. 1 if the oracle does not reach it sooner.
        """
        shares = sorted(self.losses_by_share)
        points = [(share, self.losses_by_share[share]) for share in shares] + [(1.0, self.oracle_loss)]
        if loss >= points[0][1]:
            return shares[0]
        for (before, worse), (after, better) in itertools.pairwise(points):
            if better <= loss < worse:
                return before + (after - before) * (worse - loss) / (worse - better)
        return 1.0


@dataclass(frozen=True)
class Score:
    """A method over all problems.

    Attributes:
        method: the row's name.
        s1: [problems][starts].
        s1_errors: likewise, standard errors over seeds.
        has_room: likewise, whether S1 is more than a ratio of noises.
        is_worse: likewise, whether the method is worse than the start kept as it is by more than noise.
        gaps: likewise.
        step_efficiencies: likewise.
        costs: likewise, in plain runs.
        cpu_s: of a run, mean over problems.
    """

    method: str
    s1: tuple[tuple[float, ...], ...]
    s1_errors: tuple[tuple[float, ...], ...]
    has_room: tuple[tuple[bool, ...], ...]
    is_worse: tuple[tuple[bool, ...], ...]
    gaps: tuple[tuple[float, ...], ...]
    step_efficiencies: tuple[tuple[float, ...], ...]
    costs: tuple[tuple[float, ...], ...]
    cpu_s: float

    @classmethod
    def of(cls, trials: Sequence[Trial], references: Sequence[ReferenceLosses]) -> Score:
        """The score of one method's trials, one per problem, in the order of ``references``."""
        pairs = list(zip(trials, references, strict=True))
        runs = [[[run.loss for run in of_start] for of_start in trial.runs] for trial in trials]
        measured = list(zip(runs, references, strict=True))
        return cls(
            trials[0].method,
            tuple(tuple(y.s1(i, loss) for i, loss in enumerate(t.losses)) for t, y in pairs),
            tuple(tuple(y.s1_error(i, losses) for i, losses in enumerate(own)) for own, y in measured),
            tuple(tuple(y.has_room(i) for i in range(len(y.starts))) for y in references),
            tuple(tuple(y.is_worse(i, losses) for i, losses in enumerate(own)) for own, y in measured),
            tuple(tuple(y.gap(loss) for loss in t.losses) for t, y in pairs),
            tuple(tuple(y.step_efficiency(loss) for loss in t.losses) for t, y in pairs),
            tuple(tuple(statistics.fmean(run.cost for run in runs) for runs in t.runs) for t, _ in pairs),
            statistics.fmean(trial.cpu_s for trial in trials),
        )

    @property
    def num_cases(self) -> int:
        return sum(map(len, self.s1))

    def num_at_least(self, s1: float) -> int:
        """Cases (problem and start) with at least this S1."""
        return sum(value >= s1 for values in self.s1 for value in values)

    @property
    def num_harmed(self) -> int:
        """Cases that are worse off than their default."""
        return sum(value < HARMED for values in self.s1 for value in values)

    @property
    def num_harmed_beyond_noise(self) -> int:
        """Harmed cases that differ from their default by more than two standard errors over seeds."""
        pairs = zip(self.s1, self.is_worse, strict=True)
        return sum(s1 < HARMED and worse for own, w in pairs for s1, worse in zip(own, w, strict=True))

    @property
    def num_with_room(self) -> int:
        """Cases in which there is more than noise to gain."""
        return sum(map(sum, self.has_room))

    @property
    def num_solved_with_room(self) -> int:
        pairs = zip(self.s1, self.has_room, strict=True)
        return sum(s1 >= SOLVED and room for own, r in pairs for s1, room in zip(own, r, strict=True))

    @property
    def mean_s1(self) -> float:
        """Each case counted between -1 and 1, so that one blow-up is not all that is seen."""
        return statistics.fmean(min(max(value, -1.0), 1.0) for values in self.s1 for value in values)

    def median_s1(self, start: int) -> float:
        """Over the problems that have that many starts."""
        return statistics.median(values[start] for values in self.s1 if len(values) > start)

    @property
    def mean_gap(self) -> float:
        """Each case counted at most 1: training that gained nothing."""
        return _mean(self.gaps, most=1.0)

    @property
    def mean_step_efficiency(self) -> float:
        return _mean(self.step_efficiencies)

    @property
    def mean_cost(self) -> float:
        return _mean(self.costs)


def _mean(table: Sequence[Sequence[float]], most: float = math.inf) -> float:
    return statistics.fmean(min(value, most) for values in table for value in values)
