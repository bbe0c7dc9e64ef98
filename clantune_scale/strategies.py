"""Everything that a strategy of your own imports.

Derive a class from :class:`Strategy`, give it ``plan``, ``init`` and ``evolve``, and name it in the config:
``"strategy": {"name": "package.module:Class"}``. The shortest complete example is
``clantune_scale/core/strategies/control.py``.

A strategy is pure. It computes its decisions from its arguments and the run's facts, and it draws every random number
from :func:`uniform`, :func:`uniforms`, :func:`normal`, :func:`permutation` or :func:`mutate`. All ranks then decide the
same, without a message between them.
"""

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.mutation import CLAN, mutate, normal, permutation, uniform, uniforms
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.core.strategies import build, strategy_class
from clantune_scale.core.strategies.base import Decision, Population, RunFacts, Strategy
from clantune_scale.core.strategies.lengths import competitive_steps, phases, round_end
from clantune_scale.core.strategies.options import require
from clantune_scale.core.strategies.selection import boltzmann, rank, tournament, truncation
from clantune_scale.errors import ConfigError, EvaluationError

__all__ = [
    "CLAN",
    "ConfigError",
    "Decision",
    "EvaluationError",
    "Fitness",
    "Gene",
    "Genome",
    "Phase",
    "PhaseKind",
    "Population",
    "RoundPlan",
    "RunFacts",
    "Strategy",
    "boltzmann",
    "build",
    "competitive_steps",
    "mutate",
    "normal",
    "permutation",
    "phases",
    "rank",
    "require",
    "round_end",
    "strategy_class",
    "tournament",
    "truncation",
    "uniform",
    "uniforms",
]
