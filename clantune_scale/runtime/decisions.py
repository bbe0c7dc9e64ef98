"""What all members must agree on before training goes on: the strategy's decision and one loss scale."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.core.strategies import Decision, Population, Strategy
from clantune_scale.core.strategies.lost_members import replace_lost
from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.errors import DivergenceError
from clantune_scale.runtime.engine_protocol import EngineState


def decide(
    strategy: Strategy, population: Population, fitness: Fitness, plan: RoundPlan, replica_group: ReplicaGroup
) -> Decision:
    """The strategy's decision at the end of a round. Every rank computes it, and all results must be equal.

    Args:
        strategy: the rules.
        population: that was measured.
        fitness: what was measured; [members, batches] losses, the same on every rank.
        plan: of the round.
        replica_group: this rank's peers, with whom the decision is compared.

    Raises:
        DivergenceError: if a peer decided differently.
    """
    if plan.evolves:
        decision = replace_lost(strategy.evolve(population, plan, fitness), fitness)
    else:
        decision = strategy.idle(population)
    digest = hashlib.blake2b(json.dumps(asdict(decision), sort_keys=True, default=dict).encode()).hexdigest()[:16]
    digests = replica_group.gather_json(digest)
    if len(set(digests)) > 1:
        raise DivergenceError(
            f"round {plan.index}: members decided differently ({digests}, by member) on the same losses. "
            f"Run the same versions of this package, numpy and scipy on every host."
        )
    return decision


def agree_on_loss_scale(engine: EngineState, replica_group: ReplicaGroup) -> None:
    """Sets the clan's smallest loss scale on every member: gradients that are averaged must carry one scale."""
    own = engine.loss_scale()
    if own is None:
        return
    scales = replica_group.gather_json(dict(own))
    engine.set_loss_scale(min(scales, key=lambda state: state["cur_scale"]))
