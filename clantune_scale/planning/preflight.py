"""Checks a run before it starts: all errors at once, and what follows from the config if there are none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clantune_scale.config.batch import ACCUMULATION, CLIPPING, BatchPlan, split_batch
from clantune_scale.config.deepspeed_file import BLOCK, extract, parse_block
from clantune_scale.config.deepspeed_limits import (
    EngineFacts,
    config_refusals,
    degrees_from_config,
    refusals,
    zero_stage,
)
from clantune_scale.config.deepspeed_optimizers import filled_by_others
from clantune_scale.config.deepspeed_schema import ignored_keys
from clantune_scale.config.deepspeed_values import block_of, is_number, number_of, steps_of
from clantune_scale.config.default_genes import genes_of
from clantune_scale.config.gene_catalogue import CATALOGUE, build_gene, target_of
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies import RunFacts, Strategy, build
from clantune_scale.distributed.topology import Topology
from clantune_scale.errors import ClanError, NoEffectWarning
from clantune_scale.planning.configured_optimizer import ConfiguredOptimizer
from clantune_scale.runtime.line.refusals import TURNS_REMEDY, may_compete, slope_refusals
from clantune_scale.runtime.line.refusals import refusals as line_refusals

if TYPE_CHECKING:
    from clantune_scale.planning.model_spec import LoadedModel

_IN_PAIR = {"beta1": 0, "beta2": 1}
# torch's defaults, for what the optimizer's block does not set.
_DEFAULTS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "momentum": 0.0, "lr": 1e-3, "weight_decay": 0.0}


@dataclass
class Preflight:
    """What is known of a run that has not started; parts that errors hide are None.

    Attributes:
        errors: each a sentence and its remedy; the run would not start, or train on wrong gradients.
        warnings: what would have no effect, or another than it seems.
        ds_config: the DeepSpeed config without the block.
        topology: of the ranks; with members on the line it has one member, which all ranks hold.
        may_tune_weight_decay: whether weight decay joins the genes if the run sees no training sample twice.
    """

    ds_config: Mapping[str, Any]
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    block: ClanConfig | None = None
    topology: Topology | None = None
    batch: BatchPlan | None = None
    genes: tuple[Gene, ...] | None = None
    strategy: Strategy | None = None
    may_tune_weight_decay: bool = False

    @property
    def is_line(self) -> bool:
        """Whether members lie on the line of one model."""
        return self.block is not None and self.block.members == "line"

    @property
    def ranks(self) -> str | None:
        """The topology's equation, for people; None if it is not known."""
        at = self.topology
        if at is None:
            return None
        if self.block is None or not self.is_line:
            return at.describe()
        return (
            f"{self.block.population_size} members on the line of one model: dp {at.dp} x pp {at.pp} x tp {at.tp} = "
            f"{at.world_size} ranks"
        )


def preflight(
    ds_config: Mapping[str, Any], *, world_size: int, model: LoadedModel | None = None, pp: int = 1, tp: int = 1
) -> Preflight:
    """Checks a DeepSpeed config with its block against a number of ranks and, if there is one, a model.

    Args:
        ds_config: loaded, the ``clantune`` block in it.
        world_size: ranks that the launcher will start.
        model: for genes that bind to its modules and groups.
        pp, tp: a member's pipeline and tensor degrees, if the script sets them (Megatron's arguments) and not the
            config.
    """
    rest = {key: value for key, value in ds_config.items() if key != BLOCK}
    found = Preflight(rest)
    _attempt(found, lambda: extract(rest))
    found.errors += config_refusals(rest)
    _warn_of_values(found)
    if model is not None and model.has_moe:
        found.errors += refusals(EngineFacts(has_moe=True, zero_stage=zero_stage(rest)))
    if BLOCK not in ds_config:
        found.errors.append(f'the config has no "{BLOCK}" block. Add at least "{BLOCK}": {{"population_size": 4}}.')
        return found
    found.block = _attempt(found, lambda: parse_block(ds_config[BLOCK]))
    _check_ranks(found, _models(ds_config[BLOCK]), world_size, pp, tp)
    if found.block is None:
        return found
    _check_window(found, found.block)
    if not found.block.enabled:
        found.warnings.append(f"{BLOCK}.enabled is false: the run is plain DeepSpeed.")
    _check_genes(found, found.block, model)
    optimizer = ConfiguredOptimizer(rest)
    decays = optimizer.weight_decays(model.groups if model is not None else [{}])
    most = genes_of(found.block, sees_samples_once=True, optimizer=optimizer.rule, weight_decays=decays)
    found.may_tune_weight_decay = most.keys() != found.block.genes.keys()
    if found.genes is not None:
        _check_strategy(found, found.block, found.genes)
    if found.block.members == "line":
        _check_line(found, found.block, optimizer)
    elif found.strategy is not None:
        found.errors += slope_refusals(found.strategy)
    return found


def _attempt(found: Preflight, check: Any) -> Any:
    """What ``check()`` returns. If it raises, its sentences go to the errors and the result is None."""
    try:
        return check()
    except ClanError as error:
        head, *listed = str(error).split("\n  - ")
        found.errors += listed or [head]
        return None


def _models(block: Any) -> int | None:
    """Among how many models a block divides the ranks; None if it does not say. It may have errors elsewhere."""
    plain = block.model_dump() if isinstance(block, ClanConfig) else block
    if not isinstance(plain, Mapping):
        return None
    size = plain.get("population_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        return None
    return 1 if plain.get("members") == "line" else size


def _warn_of_values(found: Preflight) -> None:
    found.warnings += ignored_keys(found.ds_config)
    autos = filled_by_others(found.ds_config)
    if autos:
        found.warnings.append(
            f'{", ".join(autos)}: "auto", which DeepSpeed does not fill in. transformers\' Trainer and accelerate do, '
            f"before they build the engine. For a loop of your own, write numbers. DeepSpeed's defaults were checked."
        )


def _check_ranks(found: Preflight, num_models: int | None, world_size: int, pp: int, tp: int) -> None:
    if num_models is None:
        return
    stages, autotp_size = degrees_from_config(found.ds_config)
    for said, key, degree in ((pp, "pipeline.stages", stages), (tp, "tensor_parallel.autotp_size", autotp_size)):
        if said > 1 and degree > 1 and said != degree:
            found.errors.append(
                f"the command line says {said}, and {key} is {degree}. Leave one out, or make them equal."
            )
    if pp > 1 and stages == 1:
        found.errors += refusals(EngineFacts(has_stages=True, zero_stage=zero_stage(found.ds_config)))
    pp, tp = max(pp, stages), max(tp, autotp_size)
    found.topology = _attempt(found, lambda: Topology.from_world(world_size, population_size=num_models, pp=pp, tp=tp))
    if found.topology is None:
        return
    # Only AutoTP's ranks are counted in DeepSpeed's batch: Megatron's know their data-parallel degree.
    how = {"population_size": num_models, "dp_size": found.topology.dp, "counted": autotp_size}
    split = _attempt(found, lambda: split_batch(found.ds_config, **how))
    found.batch = split[1] if split else None


def _check_window(found: Preflight, block: ClanConfig) -> None:
    dp = found.topology.dp if found.topology else 1
    if block.fitness.num_samples < dp:
        whose = "" if block.members == "line" else " of a member"
        found.errors.append(
            f"clantune.fitness.num_samples is {block.fitness.num_samples}, fewer than the {dp} data-parallel ranks"
            f"{whose}, each of which takes at least one. Set it to {dp} or more."
        )


def _check_genes(found: Preflight, block: ClanConfig, model: LoadedModel | None) -> None:
    if model is not None:
        found.genes = _bound(found, block, model)
        return
    genes = []
    for name, config in block.genes.items():
        value = _found_in_config(target_of(name, config), found)
        genes.append(_attempt(found, lambda n=name, c=config, v=value: build_gene(n, c, found=v)))
    found.genes = None if None in genes else tuple(genes)


def _bound(found: Preflight, block: ClanConfig, model: LoadedModel) -> tuple[Gene, ...] | None:
    """The genes as the engine would bind them; those without effect become warnings."""
    from clantune_scale.planning.model_spec import ConfigBackend
    from clantune_scale.runtime.genome_application import bind_genes

    accumulation = found.batch.accumulation if found.batch else steps_of(found.ds_config, ACCUMULATION) or 1
    backend = _attempt(found, lambda: ConfigBackend(model, found.ds_config, accumulation))
    setters = {target: lambda value: None for target in _set_by_script(block)}
    genes: list[Gene] = []
    complete = backend is not None
    for name, config in block.genes.items() if backend is not None else ():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NoEffectWarning)
            one = _attempt(
                found,
                lambda n=name, c=config: bind_genes(
                    {n: c}, backend, {t: s for t, s in setters.items() if t == target_of(n, c)}
                ),
            )
        found.warnings += [str(warning.message) for warning in caught if warning.category is NoEffectWarning]
        complete = complete and one is not None
        genes += one or ()
    return tuple(genes) if complete else None


def _found_in_config(target: str, found: Preflight) -> float | None:
    """The value that an engine of this config would have for a target."""
    if target == "clip":
        return float(number_of(found.ds_config, CLIPPING, 0.0) or 1.0)
    if target == "accumulation":
        return float(found.batch.accumulation) if found.batch else 1.0
    if target == "dropout":
        return CATALOGUE["dropout"].initial
    if target not in _DEFAULTS:
        return None
    params = block_of(block_of(found.ds_config, "optimizer"), "params")
    if target in _IN_PAIR:
        pair: Any = params.get("betas")
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(map(is_number, pair))
        return float(pair[_IN_PAIR[target]]) if is_pair else _DEFAULTS[target]
    return float(number_of(params, target, _DEFAULTS[target]))


def _set_by_script(block: ClanConfig) -> set[str]:
    """Targets with a setter, which lives in the script: a gene that is described in full is taken to have one."""
    return {target_of(name, config) for name, config in block.genes.items()} - CATALOGUE.keys()


def _check_strategy(found: Preflight, block: ClanConfig, genes: tuple[Gene, ...]) -> None:
    facts = run_facts(block, genes, found.ds_config)
    found.strategy = _attempt(found, lambda: build(block.strategy.name, facts, block.strategy.options))
    specialized = [gene.name for gene in genes if gene.kind == "specialized"]
    if specialized and block.duty_cycle == 0:
        found.warnings.append(
            f"duty_cycle is 0, so {', '.join(specialized)} is never in effect and cannot be selected. Raise it."
        )
    if block.population_size == 1:
        found.warnings.append("population_size is 1: a clan of one member cannot select. Raise it.")
    if facts.total_steps is None:
        found.warnings.append("total_steps is not known: genes never freeze and nothing decays at the end. Set it.")


def _check_line(found: Preflight, block: ClanConfig, optimizer: ConfiguredOptimizer) -> None:
    """What one model cannot do for its members, and what its loop has to do."""
    found.errors += line_refusals(block, found.strategy, found.genes or (), optimizer, setters=_set_by_script(block))
    strategy = found.strategy
    if strategy is not None and strategy.has_one_state and may_compete(strategy):
        found.warnings.append(
            f"this strategy lets members compete, and members on the line take turns in it. A DeepSpeed loop takes "
            f"them by itself if its loss is the model's own. Otherwise, {TURNS_REMEDY}"
        )


def run_facts(block: ClanConfig, genes: tuple[Gene, ...], ds_config: Mapping[str, Any]) -> RunFacts:
    """The facts that the run's strategy gets."""
    scheduled = steps_of(block_of(block_of(ds_config, "scheduler"), "params"), "total_num_steps")
    return block.facts(genes, total_steps=block.total_steps or scheduled)
