"""What all members must hold in common before a round goes on: the decision, and one loss scale."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from clantune_scale.core.rounds import RoundPlan
from clantune_scale.core.strategies import Decision
from clantune_scale.core.strategies.lost_members import replace_lost
from clantune_scale.errors import DivergenceError

if TYPE_CHECKING:
    from clantune_scale.runtime.clan import Clan


def decide(clan: Clan, plan: RoundPlan) -> Decision:
    """The strategy's decision; every rank makes its own, and all must be equal.

    Raises:
        DivergenceError: if a peer decided otherwise.
    """
    if plan.evolves:
        decision = replace_lost(clan.strategy.evolve(clan.population, plan, clan.fitness), clan.fitness)
    else:
        decision = clan.strategy.idle(clan.population)
    digest = hashlib.blake2b(json.dumps(asdict(decision), sort_keys=True, default=dict).encode()).hexdigest()[:16]
    said = clan.world.replica_group.gather_json(digest)
    if len(set(said)) > 1:
        raise DivergenceError(
            f"round {plan.index}: members decided differently ({said}, by member) on the same losses. "
            f"Run the same versions of this package, numpy and scipy on every host."
        )
    return decision


def agree_on_loss_scale(clan: Clan) -> None:
    """While gradients are averaged they must carry one scale: the clan takes the smallest."""
    mine = clan.backend.loss_scale()
    if mine is None:
        return
    everyone = clan.world.replica_group.gather_json(dict(mine))
    clan.backend.set_loss_scale(min(everyone, key=lambda state: state["cur_scale"]))
