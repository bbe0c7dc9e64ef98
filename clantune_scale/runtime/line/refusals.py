"""What members on the line cannot do, refused by name before the first step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.line import DECAY, RATE, DecayRule
from clantune_scale.core.rounds import PhaseKind, expected_steps
from clantune_scale.core.strategies import Strategy
from clantune_scale.errors import ConfigError

_GROUPS = 'or set "members" to "groups"'
#: How a loop gives members their turns, or does without them; after "To give them, ".
TURNS_REMEDY = (
    "loop over clan.steps(loader); or pass train_step=..., which does one optimizer step, to attach(); or leave the "
    'competition out: "strategy": {"name": "clan", "options": {"trial_cost": 0}}.'
)

NO_SLOPES = "Leave the option out: learning rates then move by the members' losses."


class LineEngine(Protocol):
    """What the checks ask of an engine."""

    def decay_rules(self) -> Sequence[DecayRule | None]:
        """[groups] how the optimizer applies a weight decay; None if no linear rule is known."""

    def optimizer_name(self) -> str:
        """The optimizer's class."""

    def validation_gradients(self) -> object:
        """What gives gradients of validation losses; a string that says why the engine cannot."""


def require_line(
    config: ClanConfig, strategy: Strategy, genes: Sequence[Gene], engine: LineEngine, *, setters: Collection[str]
) -> None:
    """Checks that one model can stand for the members of a run.

    Args:
        config: the block.
        strategy: of the run.
        genes: that it has.
        engine: that trains.
        setters: targets that the user sets.

    Raises:
        ConfigError: if it cannot.
    """
    for reason in refusals(config, strategy, genes, engine, setters=setters):
        raise ConfigError(reason)


def require_no_slopes(strategy: Strategy) -> None:
    """Checks that a strategy does not need what members in groups do not have.

    Raises:
        ConfigError: if it does.
    """
    for reason in slope_refusals(strategy):
        raise ConfigError(reason)


def slope_refusals(strategy: Strategy) -> Iterator[str]:
    """Why members in groups cannot run a strategy that needs slopes."""
    if strategy.needs_slopes:
        yield (
            "the strategy's option group_slopes needs every group's own displacement in a round, which members in "
            f'groups do not store. Set "members" to "line". {NO_SLOPES}'
        )


def refusals(
    config: ClanConfig,
    strategy: Strategy | None,
    genes: Sequence[Gene],
    engine: LineEngine,
    *,
    setters: Collection[str],
) -> Iterator[str]:
    """Every reason why one model cannot stand for the members of a run, each with its remedy.

    Args:
        config: the block.
        strategy: of the run; None if it is not known.
        genes: that it has.
        engine: that trains, or what a config says of it.
        setters: targets that the user sets.
    """
    if strategy is not None and not strategy.has_one_state:
        yield (
            f"the strategy {config.strategy.name!r} lets members hold states of their own, and members on the line "
            f'share one. Use "clan" or "control", {_GROUPS}.'
        )
    if strategy is not None and strategy.needs_slopes:
        found = engine.validation_gradients()
        if isinstance(found, str):
            yield f"the strategy's option group_slopes takes gradients of the validation loss, and {found}. {NO_SLOPES}"
    if config.faults.min_members is not None:
        yield (
            f"faults.min_members is {config.faults.min_members}, and members on the line do not die one by one: all "
            f"ranks hold one model. Leave it out; the run resumes from its last round, as any run of this engine."
        )
    for gene in genes:
        yield from _gene_refusals(gene, engine, setters)


def _gene_refusals(gene: Gene, engine: LineEngine, setters: Collection[str]) -> Iterator[str]:
    if gene.target == "accumulation":
        yield (
            f"gene {gene.name!r}: members on the line train on the same micro-batches in turns, so their number cannot "
            f"differ. Leave the gene out, {_GROUPS}."
        )
        return
    if gene.kind != "optimizer":
        return
    if gene.target not in (RATE, DECAY) or gene.target in setters:
        what = "is set by a function of yours" if gene.target in setters else "has no closed form"
        yield (
            f"gene {gene.name!r}: members on the line are computed from one model, and the effect of {gene.target!r} "
            f"on an update {what}. Leave the gene out, {_GROUPS}."
        )
    elif gene.target == DECAY and None in engine.decay_rules():
        yield (
            f"gene {gene.name!r}: {engine.optimizer_name()} does not apply its weight decay by a rule that is known to "
            f"be linear in it. Leave the gene out, {_GROUPS}."
        )


def may_compete(strategy: Strategy) -> bool:
    """Whether any round of a run, by its plan, has a competitive phase."""
    facts, index, step = strategy.facts, 0, 0
    total = expected_steps(facts.total_steps, facts.round_length_steps)
    while step < total:
        plan = strategy.plan(index, step)
        if any(phase.kind is PhaseKind.COMPETITIVE for phase in plan.phases):
            return True
        index, step = index + 1, plan.end_step
    return False
