"""Peak bytes of a rank: an engine with a clan on the line against the same engine without one.

``python -m clantune_scale.bench.memory`` starts each engine without a clan, with ``line.store`` on the device and with
it in host memory, on a few ranks over gloo, and counts live tensors operator by operator through rounds, evaluations
and a learning-rate trial. Snapshots, held batches and, with ``host``, the arrays of a round count as host memory.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import TensorDataset

from clantune_scale.bench.live_bytes import LiveBytes
from clantune_scale.bench.ranks import Ranks
from clantune_scale.bench.sharing import MICRO_BATCH, Blocks
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.planning.budget import Size, forecast

#: By name, the stage of ZeRO that shards alike; FSDP2 and DDP are loops of the user's own.
ENGINES = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": 3, "ddp": 0}
STORES = ("device", "host")
#: Two rounds, a trial of three competitors, a round.
TOTAL_STEPS, NUM_STEPS, MEMBERS = 100, 37, 3
HEAD = """\
| engine | line.store | plain, MB | with a clan, MB | ratio | added, MB | plan, MB | host, MB |
|---|---|---|---|---|---|---|---|"""
_TOKENS = 16


@dataclass(frozen=True)
class MemorySetting:
    """What is measured.

    Attributes:
        ranks: of the engine.
        width, depth: of the model.
    """

    ranks: int = 2
    width: int = 256
    depth: int = 6


class MemoryRank:
    """One rank's engine with or without a clan, and the counts of its tensors.

    Args:
        setting: what is measured.
        engine: of :data:`ENGINES`.
        store: of the line; None for no clan.
        directory: where the clan leaves its traces.
    """

    def __init__(self, setting: MemorySetting, engine: str, store: str | None, directory: str) -> None:
        self._held = ExitStack()
        self._bytes, self._taken = LiveBytes(), 0
        self._held.enter_context(self._bytes.resizing())
        if store is not None:
            for owner, name in _host_makers(store):
                self._held.callback(self._bytes.on_host(owner, name))
        self._held.enter_context(self._bytes)
        torch.manual_seed(0)
        model = Blocks(setting.width, setting.depth)
        self._tokens = torch.randn(MICRO_BATCH, _TOKENS, setting.width)
        block = None if store is None else _block(store, directory)
        start = _start_deepspeed if engine.startswith("zero") else _start_loop
        # The clan's own lines would stand in the middle of the table.
        with redirect_stdout(io.StringIO()):
            self._clan, self._steps = start(engine, model, self._tokens, block, self._bytes)

    def train(self, kind: str, num_steps: int) -> dict[str, int]:
        """Bytes: the most on the device and in host memory since the engine was built, and "trials" that were held."""
        with redirect_stdout(io.StringIO()):
            for _ in self._steps:
                # Steps of turns are not counted.
                self._taken = self._taken + 1 if self._clan is None else self._clan.num_steps
                if self._taken >= num_steps:
                    break
        rounds = [] if self._clan is None else self._clan.progress.lineage
        trials = sum(phase.kind is PhaseKind.COMPETITIVE for record in rounds for phase in record.phases)
        return {**self._bytes.peak, "trials": trials}


def _host_makers(store: str) -> list[tuple[Any, str]]:
    """(class, method) of what makes tensors that belong into host memory."""
    from clantune_scale.runtime.line.points import Points
    from clantune_scale.runtime.line.turns import HeldBatch
    from clantune_scale.runtime.weight_averages import WeightEma
    from clantune_scale.transfer import Snapshot

    found: list[tuple[Any, str]] = [(Snapshot, "__init__"), (HeldBatch, "__init__")]
    if store == "host":
        found += [(WeightEma, "__init__"), (Points, "_kept"), (Points, "_keep_start")]
    return found


def _start_deepspeed(
    engine: str, model: torch.nn.Module, tokens: torch.Tensor, block: dict[str, Any] | None, counted: LiveBytes
) -> tuple[Any, Iterator[None]]:
    import deepspeed

    import clantune_scale
    from clantune_scale.backends.deepspeed.engine import suppress_start_up_noise

    suppress_start_up_noise()
    parameters = list(model.parameters())
    built, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=_ds_config(ENGINES[engine]))
    counted.restart()
    clan = None
    if block is not None:
        clan = clantune_scale.attach(built, config={"clantune": block}, eval_data=TensorDataset(tokens))

    def steps() -> Iterator[None]:
        while True:
            built.backward(built(tokens))
            built.step()
            yield

    return clan, steps()


def _start_loop(
    engine: str, model: torch.nn.Module, tokens: torch.Tensor, block: dict[str, Any] | None, counted: LiveBytes
) -> tuple[Any, Iterator[None]]:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    import clantune_scale

    dist.init_process_group("gloo")
    wrapped: torch.nn.Module
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for part in model.children():
            for layer in part.children():
                fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    counted.restart()
    clan = None
    if block is not None:
        examples = TensorDataset(tokens)
        clan = clantune_scale.attach(wrapped, optimizer, config=block, eval_data=examples, micro_batch_size=MICRO_BATCH)

    def batches() -> Iterator[Any]:
        while True:
            yield (tokens,)

    def steps() -> Iterator[None]:
        taken = ([batch] for batch in batches()) if clan is None else clan.steps(batches())
        for step in taken:
            for batch in step:
                wrapped(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return clan, steps()


def _ds_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }


def _block(store: str, directory: str) -> dict[str, Any]:
    return {
        "population_size": MEMBERS,
        "members": "line",
        "round_length": 5,
        "total_steps": TOTAL_STEPS,
        "genes": {"lr": {}},
        "line": {"store": store},
        "strategy": {"name": "clan", "options": {"trial_cost": 0.6, "trial_at": 0.09}},
        "fitness": {"num_samples": MICRO_BATCH, "batch_size": MICRO_BATCH // 2},
        "tracking": {"directory": directory, "mlflow": False, "print_every_steps": 10**9},
        "checkpoint": {"champion": False, "every_rounds": None},
    }


@dataclass(frozen=True)
class Peaks:
    """One engine with one place for the line's arrays.

    Attributes:
        engine, store: see :data:`ENGINES` and :data:`STORES`.
        plain: bytes on a rank's device without a clan.
        clan: with one.
        host: bytes in host memory with one.
        planned: bytes that ``clantune plan`` says the clan adds on the device.
    """

    engine: str
    store: str
    plain: int
    clan: int
    host: int
    planned: int

    @property
    def ratio(self) -> float:
        """With a clan, over without."""
        return self.clan / self.plain


def planned_bytes(setting: MemorySetting, engine: str, store: str) -> int:
    """What ``clantune plan`` says that a clan adds to the peak on a rank's device.

    In a loop of the user's own, gradients are alive while points are measured.
    """
    with torch.device("meta"):
        sizes = tuple(parameter.numel() for parameter in Blocks(setting.width, setting.depth).parameters())
    one = forecast(
        _ds_config(ENGINES[engine]),
        ClanConfig.model_validate(_block(store, "")),
        (Gene("lr", relative=True),),
        Size(sizes),
        world_size=setting.ranks,
        num_steps=TOTAL_STEPS,
        hardware=None,
        measured=None,
    )
    memory = one.memory
    if not engine.startswith("zero"):
        return memory.average + memory.line + memory.centre
    return memory.peak - (memory.device - memory.average - memory.line)


def measure(setting: MemorySetting, engine: str, stores: Sequence[str] = STORES) -> list[Peaks]:
    """Runs an engine without a clan, then with one for each store.

    Raises:
        ClanError: if a rank fails, or the run had no trial.
    """
    plain = _peaks(setting, engine, None)
    found = []
    for store in stores:
        clan = _peaks(setting, engine, store)
        planned = planned_bytes(setting, engine, store)
        found.append(Peaks(engine, store, plain["device"], clan["device"], clan["host"], planned))
    return found


def _peaks(setting: MemorySetting, engine: str, store: str | None) -> dict[str, int]:
    """The most of any rank."""
    with tempfile.TemporaryDirectory() as directory:
        ranks = Ranks(setting.ranks, MemoryRank, setting, engine, store, directory)
        try:
            counts = ranks.train("", NUM_STEPS)
        finally:
            ranks.close()
    assert store is None or all(one["trials"] for one in counts), "the run was too short for its trial"
    return {kind: max(one.get(kind, 0) for one in counts) for kind in ("device", "host")}


def rows(measured: Sequence[Peaks]) -> str:
    """The peaks as rows of a Markdown table, one for each engine and store; :data:`HEAD` goes before them."""
    found = []
    for one in measured:
        figures = (one.plain, one.clan, one.clan - one.plain, one.planned, one.host)
        plain, clan, added, planned, host = (f"{figure / 1e6:.2f}" for figure in figures)
        found.append(
            f"| {one.engine} | {one.store} | {plain} | {clan} | {one.ratio:.3f} | {added} | {planned} | {host} |"
        )
    return "\n".join(found)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    defaults = MemorySetting()
    parser = argparse.ArgumentParser(
        prog="python -m clantune_scale.bench.memory", description="Peak bytes of a rank with and without a clan."
    )
    for name in ("ranks", "width", "depth"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    given = vars(parser.parse_args(arguments))
    engines = given.pop("engines")
    setting = MemorySetting(**given)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in Blocks(setting.width, setting.depth).parameters())
    print(f"{setting.ranks} ranks over gloo, {size / 1e6:.2f} M parameters in float32, AdamW, {NUM_STEPS} steps")
    print(HEAD, flush=True)
    for engine in engines:
        print(rows(measure(setting, engine)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
