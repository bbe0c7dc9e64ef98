"""``clantune validate``: checks a run without GPUs, all errors at once."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from clantune_scale.cli.command import Answer, Command
from clantune_scale.cli.model_arguments import add_config_arguments, read_config, read_model
from clantune_scale.config.deepspeed_limits import dtype_of, zero_stage
from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import RoundClock
from clantune_scale.distributed.topology import Topology
from clantune_scale.errors import ClanError
from clantune_scale.planning.preflight import Preflight, preflight

_SHOWN_MEMBERS = 4


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--strict", action="store_true", help="count warnings as errors")


def _run(arguments: argparse.Namespace) -> Answer:
    ds_config = read_config(arguments)
    model, unusable = None, None
    try:
        model = read_model(arguments)
    except ClanError as error:
        unusable = str(error)
    found = preflight(
        ds_config,
        world_size=arguments.world_size,
        model=model,
        pp=arguments.pipeline_parallel_size,
        tp=arguments.tensor_parallel_size,
    )
    if unusable:
        found.errors.append(unusable)
    errors = found.errors + (found.warnings if arguments.strict else [])
    is_bound = model is not None
    return Answer(_text(found, is_bound), _data(found, is_bound, is_valid=not errors), exit_code=1 if errors else 0)


def _text(found: Preflight, is_bound: bool) -> str:
    lines = [f"{name:<9} {line}" for name, line in _facts(found)]
    if found.genes and not is_bound:
        lines.append(f"{'':<9} unknown whether the genes bind to the model: give --model")
    lines += [f"warning: {text}" for text in found.warnings]
    lines += [f"error: {text}" for text in found.errors]
    counts = [(len(found.errors), "error"), (len(found.warnings), "warning")]
    lines.append(", ".join(f"{count} {word}{'s' * (count != 1)}" for count, word in counts))
    return "\n".join(lines)


def _facts(found: Preflight) -> list[tuple[str, str]]:
    facts = [("engine", f"ZeRO {zero_stage(found.ds_config)}, {dtype_of(found.ds_config)}")]
    if found.topology:
        facts.append(("topology", found.ranks or found.topology.describe()))
        lines = [_one_world(found.topology)] if found.is_line else _groups(found.topology)
        facts += [("", line) for line in lines]
    if found.batch:
        facts.append(("batch", found.batch.describe()))
    facts += [("gene", _gene(gene)) for gene in found.genes or ()]
    if found.may_tune_weight_decay:
        own = "" if "optimizer" in found.ds_config else " with AdamW and a weight decay above 0"
        facts.append(("", f"weight_decay too, if the run{own} sees no training sample twice"))
    if found.strategy and found.block:
        first = RoundClock(found.strategy.plan).round(0)
        phases = ", ".join(f"{phase.num_steps} {phase.kind.value}" for phase in first.phases)
        facts.append(("strategy", f"{found.block.strategy.name}; the first round: {phases} steps"))
    return facts


def _groups(topology: Topology) -> list[str]:
    """The ranks of the first members, the first replica group and the group that averages gradients."""
    shown = range(min(topology.population_size, _SHOWN_MEMBERS))
    members = [f"member {m}: ranks {_span(topology.member_ranks(m))}" for m in shown]
    more = topology.population_size - len(members)
    lines = members + [f"and {more} more members"] * bool(more)
    lines.append(f"replica group 0 of {topology.member_size}: ranks {_span(topology.replica_group_ranks(0))}")
    return [*lines, f"gradients are averaged over {len(topology.gradient_ranks(0))} ranks"]


def _one_world(topology: Topology) -> str:
    ranks = len(topology.gradient_ranks(0))
    return f"all ranks train one model; gradients are averaged over {ranks} ranks, as without a clan"


def _span(ranks: list[int]) -> str:
    is_block = len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1))
    if is_block:
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def _gene(gene: Gene) -> str:
    low, high = gene.bounds
    groups = f" on {', '.join(gene.groups)}" if gene.groups else ""
    mode = "relative" if gene.relative else "absolute"
    return f"{gene.name}{groups}: {gene.kind}, {mode}, {low:g} to {high:g} ({gene.scale}), starts at {gene.initial:g}"


def _data(found: Preflight, is_bound: bool, *, is_valid: bool) -> dict[str, Any]:
    topology = found.topology
    return {
        "valid": is_valid,
        "errors": found.errors,
        "warnings": found.warnings,
        "topology": topology and {**asdict(topology), "world_size": topology.world_size},
        "form": found.block and found.block.members,
        "members": topology and _members(found, topology),
        "batch": found.batch and asdict(found.batch),
        "genes": found.genes and [asdict(gene) for gene in found.genes],
        "genes_are_bound": is_bound,
    }


def _members(found: Preflight, topology: Topology) -> list[list[int]]:
    """[members] the ranks of each: all of them on the line."""
    if found.is_line and found.block is not None:
        return [topology.member_ranks(0)] * found.block.population_size
    return [topology.member_ranks(member) for member in range(topology.population_size)]


COMMAND = Command(
    name="validate",
    summary="check a run without GPUs",
    description="""Checks a DeepSpeed config with its clantune block: misspelt keys, settings that DeepSpeed or the clan
refuse, topology, batch arithmetic, strategy and options, what members on the line cannot do ("members": "line"), and,
with --model, that every gene binds to something.
All errors are shown at once; the exit code is 1 if there are any. With --model the model is built on the meta
device, so that a large one needs no memory; a factory that returns (module, parameter_groups) lets genes with
"groups" be checked too.""",
    examples="""  clantune validate ds.json --world-size 64
  clantune validate ds.json --world-size 384 --tensor-parallel-size 4 --pipeline-parallel-size 12
  clantune validate ds.json --world-size 64 --model my_models:gpt --json | jq .errors
  clantune validate configs/quickstart.json --world-size 4 --model launch/gpt.py:GPT \\
      --model-args '{"context": 128, "width": 64, "num_layers": 2, "num_heads": 4}'""",
    add_arguments=_add_arguments,
    run=_run,
)
