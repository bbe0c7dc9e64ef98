"""``clantune plan``: what a run will cost."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, replace
from typing import Any

from clantune_scale.cli.command import Answer, Command
from clantune_scale.cli.model_arguments import add_config_arguments, read_config, read_model
from clantune_scale.cli.opened_run import open_run
from clantune_scale.cli.plan_text import describe
from clantune_scale.errors import ClanError
from clantune_scale.planning.budget import Forecast, Size, data_parallel_part, fitting, forecast
from clantune_scale.planning.forms import Form, FormName, forms_of
from clantune_scale.planning.hardware import PRESETS, Hardware, read_hardware
from clantune_scale.planning.measured import measure
from clantune_scale.planning.memory import RankMemory, rank_memory, state_bytes
from clantune_scale.planning.preflight import Preflight, preflight
from clantune_scale.planning.traffic import (
    Collective,
    Scope,
    clone_traffic,
    crossing_bytes,
    inside_bytes,
    mean_round_bytes,
    round_end_traffic,
    step_traffic,
)

_DEFAULT_STEPS = 10_000


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--params", type=_count, metavar="N", help="trainable parameters, instead of --model (7e9)")
    parser.add_argument("--hardware", metavar="NAME|JSON", help=f"{', '.join(PRESETS)}, or JSON (text or file)")
    parser.add_argument("--measured", metavar="RUN", help="seconds from a run's events, not estimated")
    parser.add_argument("--tokens-per-sample", type=_count, metavar="N", help="needed for seconds without --measured")
    parser.add_argument(
        "--steps", type=_count, metavar="N", help="optimizer steps of the run, if the config does not say"
    )
    parser.add_argument("--budget-percent", type=float, metavar="B", help="list settings with at most B %% overhead")


def _run(arguments: argparse.Namespace) -> Answer:
    ds_config = read_config(arguments)
    model = read_model(arguments)
    if (model is None) == (arguments.params is None):
        raise ClanError("the size of the model is unknown. Give either --model MODULE:FACTORY or --params N.")
    degrees = {"pp": arguments.pipeline_parallel_size, "tp": arguments.tensor_parallel_size}
    whole = preflight(ds_config, world_size=arguments.world_size, model=model, **degrees)
    num_parts = whole.topology.pp * whole.topology.tp if whole.topology else 1
    ds_config = data_parallel_part(ds_config, whole.batch)
    world_size = arguments.world_size // num_parts
    found = whole if num_parts == 1 or whole.errors else preflight(ds_config, world_size=world_size, model=model)
    if found.errors or found.block is None or found.genes is None or found.strategy is None:
        raise ClanError(f"{found.errors[0]} `clantune validate` shows all errors ({len(found.errors)}).")
    how = {
        "world_size": world_size,
        "num_steps": arguments.steps or found.strategy.facts.total_steps or _DEFAULT_STEPS,
        "hardware": read_hardware(arguments.hardware) if arguments.hardware else None,
        "measured": measure(open_run(arguments.measured).events) if arguments.measured else None,
    }
    size = _size(arguments, model).part(num_parts)
    one = forecast(found.ds_config, found.block, found.genes, size, **how)
    forms = forms_of(ds_config, one, size, model=model, **how)
    data = _data(one, how) | _of_whole(whole, num_parts, _size(arguments, model))
    data |= {"form": found.block.members, "forms": _forms(forms, how["hardware"])}
    if arguments.budget_percent is not None:
        data["budget"] = _budget(arguments.budget_percent, found, size, how, one)
    return Answer(describe(data), data)


def _size(arguments: argparse.Namespace, model: Any) -> Size:
    tokens = arguments.tokens_per_sample
    if model is None:
        return Size((arguments.params,), tokens_per_sample=tokens)
    module = model.module
    frozen = sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    groups = [sum(p.numel() for p in group["params"] if p.requires_grad) for group in model.groups]
    return Size(tuple(model.trainable), tuple(groups), frozen + buffers, tokens)


def _of_whole(whole: Preflight, num_parts: int, size: Size) -> dict[str, Any]:
    """What the plan says of whole members, and a warning if it counts one of their tensor and pipeline parts."""
    left_out = (
        f"the plan counts one of the {num_parts} tensor and pipeline parts of a member. It leaves out what the parts "
        f"send each other, and the time that stages wait."
    )
    return {
        "ranks": whole.ranks,
        "batch": whole.batch and whole.batch.describe(),
        "parameters": sum(size.parameters),
        "num_parts": num_parts,
        "warnings": whole.warnings + [left_out] * (num_parts > 1),
    }


def _data(one: Forecast, how: dict[str, Any]) -> dict[str, Any]:
    job, plain, cost = one.job, one.job.without_clan(), one.cost
    # The same ranks in one ring, counted at the boundaries of the clan's members; one model has none.
    scope: Scope = "member" if job.points else "clan"
    parts: dict[str, dict[str, Any]] = {
        "plain_step": _traffic((replace(part, scope=scope) for part in step_traffic(plain)), job),
        "cooperative_step": _traffic(step_traffic(job), job),
        "last_cooperative_step": _traffic(step_traffic(job, has_diagnostics=True), job),
        "competitive_step": _traffic(step_traffic(job, cooperates=False), job),
        "round_end": _traffic(round_end_traffic(job), job),
        "clone": _traffic(clone_traffic(job), job),
    }
    parts["mean_round"] = dict(zip(("inside_bytes", "crossing_bytes"), mean_round_bytes(job, one.walk), strict=True))
    hardware, measured = how["hardware"], how["measured"]
    return {
        "zero_stage": job.stage,
        "memory": {
            "clan": _bytes(one.memory),
            "plain": _bytes(rank_memory(plain)),
            "device_limit": hardware.memory_bytes if hardware else None,
            "state": state_bytes(job),
        },
        "traffic": parts,
        "cost": asdict(cost)
        | {
            "sample_loss_percent": cost.sample_loss_percent,
            "work_percent": cost.work_percent,
            "time_percent": cost.time_percent,
            "overhead_percent": cost.overhead_percent,
        },
        "unique_tokens_lost": _tokens_lost(one),
        "hardware": asdict(hardware) if hardware else None,
        "measured": asdict(measured) if measured else None,
    }


def _traffic(collectives: Any, job: Any) -> dict[str, Any]:
    """Every collective, and the bytes on the wire of one member: inside it and out of it."""
    listed: list[Collective] = [one for one in collectives if one.elements]
    return {
        "collectives": [asdict(one) | {"bytes": one.payload_bytes} for one in listed],
        "inside_bytes": inside_bytes(listed, job),
        "crossing_bytes": crossing_bytes(listed, job),
    }


def _bytes(memory: RankMemory) -> dict[str, int]:
    """Each part, and the sums."""
    ends = {"round_end": memory.round_end, "round_end_in_loop": memory.round_end_in_loop}
    return asdict(memory) | {"device": memory.device, **ends, "peak": memory.peak}


def _forms(forms: dict[FormName, Form], hardware: Hardware | None) -> dict[str, dict[str, Any]]:
    """By form, bytes of a rank, seconds of the run, whether a device holds it, and why it is impossible."""
    return {
        name: {
            "memory": form.memory and _bytes(form.memory),
            "seconds": form.seconds,
            "fits": None if form.memory is None or hardware is None else form.memory.peak <= hardware.memory_bytes,
            "obstacle": form.obstacle,
        }
        for name, form in forms.items()
    }


def _tokens_lost(one: Forecast) -> int | None:
    tokens = one.job.tokens_per_sample
    return None if tokens is None else (one.cost.samples - one.cost.unique_samples) * tokens


def _budget(percent: float, found: Preflight, size: Size, how: dict[str, Any], one: Forecast) -> dict[str, Any]:
    if one.cost.overhead_percent is None:
        raise ClanError(
            "--budget-percent needs seconds, and none are known. Give --hardware with --tokens-per-sample, or "
            "--measured RUN."
        )
    assert found.block is not None and found.genes is not None, "a config with errors was refused before"
    fits = fitting(found.ds_config, found.block, found.genes, size, budget_percent=percent, **how)
    rows = [
        {
            "population_size": fit.population_size,
            "duty_cycle": fit.duty_cycle,
            "overhead_percent": fit.cost.overhead_percent,
            "device_bytes": fit.memory.peak,
        }
        for fit in fits
    ]
    return {"percent": percent, "fits": rows}


def _count(text: str) -> int:
    """A whole number, 7e9 among them, as argparse takes a type."""
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not (math.isfinite(value) and value >= 1 and value == int(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(value)


COMMAND = Command(
    name="plan",
    summary="what a run will cost",
    description="""Memory of a rank and seconds of the run in four forms on the same ranks: members in groups, members
on the line, plain ZeRO or FSDP over all ranks, and as many sharded replicas as members (HSDP). Then, of the form that
the config chooses: bytes between ranks, samples that are not new, seconds, and the overhead against plain data
parallelism. Bytes are exact (of rings, on the wire); seconds add computing and sending as if they did not overlap,
from the hardware's nominal values, or come from a finished run. Presets are vendors' nominal values; give your own as
JSON:
  {"like": "h100", "network_bytes_s": 25e9, "compute_share": 0.5}""",
    examples="""  clantune plan ds.json --params 7e9 --world-size 64 --hardware h100 --tokens-per-sample 4096
  clantune plan ds.json --model my_models:gpt --world-size 64 --hardware cluster.json --tokens-per-sample 4096
  clantune plan ds.json --params 1e8 --world-size 4 --measured clan_runs/quickstart --budget-percent 5""",
    add_arguments=_add_arguments,
    run=_run,
)
