"""Four ways to use the same ranks: members in groups, members on the line, plain sharding, and replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clantune_scale.config.deepspeed_file import BLOCK
from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.errors import ConfigError
from clantune_scale.planning.budget import Forecast, Size, divided, forecast
from clantune_scale.planning.cost import pace_of
from clantune_scale.planning.memory import RankMemory, rank_memory
from clantune_scale.planning.preflight import preflight

if TYPE_CHECKING:
    from clantune_scale.planning.model_spec import LoadedModel

FormName = Literal["groups", "line", "plain", "hsdp"]
_STEP = Phase(PhaseKind.COOPERATIVE, 1)


@dataclass(frozen=True)
class Form:
    """One way to use the ranks.

    Attributes:
        memory: of a rank; None if these ranks or this config do not allow the form.
        seconds: of the run; None if they are not known.
        obstacle: why it is impossible, in a line; None if it is not.
    """

    memory: RankMemory | None = None
    seconds: float | None = None
    obstacle: str | None = None


def forms_of(
    ds_config: Mapping[str, Any], chosen: Forecast, size: Size, *, model: LoadedModel | None, **how: Any
) -> dict[FormName, Form]:
    """What each form costs on the ranks of a plan.

    ``plain`` is ZeRO or FSDP over all ranks. ``hsdp`` has as many replicas as the clan has members, each sharded over
    its own ranks. Neither has a clan, nor its average and snapshots.

    Args:
        ds_config: a DeepSpeed config with a block that preflight accepts.
        chosen: what was forecast for it.
        size: of the model.
        model: as for preflight.
        **how: the rest of :func:`~clantune_scale.planning.budget.forecast`'s arguments.
    """
    plain = chosen.job.without_clan()
    return {
        "groups": _of_clan(ds_config, "groups", size, model, how),
        "line": _of_clan(ds_config, "line", size, model, how),
        "plain": Form(rank_memory(plain), chosen.cost.plain_seconds),
        "hsdp": _of_replicas(ds_config, chosen, how),
    }


def _of_clan(
    ds_config: Mapping[str, Any], members: str, size: Size, model: LoadedModel | None, how: Mapping[str, Any]
) -> Form:
    block = ds_config[BLOCK]
    changed = {**ds_config, BLOCK: {**block, "members": members}}
    found = preflight(changed, world_size=how["world_size"], model=model)
    if found.errors or found.block is None or found.genes is None:
        return Form(obstacle=_problem(found.errors[0]))
    try:
        one = forecast(found.ds_config, found.block, found.genes, size, **how)
    except ConfigError as error:
        return Form(obstacle=_problem(str(error)))
    return Form(one.memory, None if one.cost.seconds is None else sum(one.cost.seconds.values()))


def _of_replicas(ds_config: Mapping[str, Any], chosen: Forecast, how: Mapping[str, Any]) -> Form:
    try:
        batch = divided(ds_config, chosen.population_size, how["world_size"])
    except ConfigError as error:
        return Form(obstacle=_problem(str(error)))
    job = chosen.job.replicated(chosen.population_size, batch)
    pace = pace_of(job, how["hardware"], how["measured"])
    return Form(rank_memory(job), None if pace is None else pace.step_s(_STEP) * chosen.walk.num_steps)


def _problem(error: str) -> str:
    """The first sentence of an error, which its remedy follows."""
    return error.split(". ")[0].rstrip(".")
