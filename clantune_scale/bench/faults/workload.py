"""What is trained under fault injection, and each rank's final state, by which two runs are compared."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from clantune_scale.bench.faults import processes
from clantune_scale.bench.faults.injector import Fault
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.tracking import read_events
from clantune_scale.transfer.state import state_digest

STEPS, ROUND = 17, 5
#: The contract suite's families: a module per engine, with ``CASES`` and ``start(setup, block)``.
FAMILIES = "tests.backends.families"


@dataclass(frozen=True)
class Workload:
    """An engine's set-up by name, so that it can be sent to a process.

    Attributes:
        family, case: a module of ``families`` and one of its ``CASES``.
        changes: changed fields of the case's set-up.
        families: the package.
        strategy: the clan's.
    """

    family: str
    case: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    families: str = FAMILIES
    strategy: str = "clan"

    def of(self, families: str) -> Workload:
        """The same workload from another package."""
        return replace(self, families=families)

    @property
    def module(self) -> Any:
        """The family.

        Raises:
            ConfigError: if it cannot be imported, as in an installed package without the repository.
        """
        try:
            return importlib.import_module(f"{self.families}.{self.family}")
        except ImportError as error:
            raise ConfigError(
                f"{self.families}.{self.family} cannot be imported: {error}. Run this in a clone of the repository, "
                f"or give --families a package of your own."
            ) from error

    @property
    def setup(self) -> Any:
        return replace(self.module.CASES[self.case], **self.changes)

    def block(self, folder: Path, **checkpoint: Any) -> dict[str, Any]:
        """The clan's block: rounds of 5 steps; the same launch resumes where the last one stopped."""
        return {
            "population_size": self.setup.members,
            "round_length": ROUND,
            "duty_cycle": 0.4,
            "strategy": self.strategy,
            "fitness": {"num_samples": 64, "batch_size": 8},
            "tracking": {"directory": str(folder), "run_name": "run", "mlflow": False, "print_every_steps": 1000},
            "checkpoint": {"resume": "latest", "keep_last": 20, **checkpoint},
            "join": {"timeout_s": 60},
            "faults": {"deadline_s": 30.0},
        }

    def launch(
        self,
        folder: Path,
        *faults: Fault,
        block: Mapping[str, Any] | None = None,
        num_steps: int = STEPS,
        timeout_s: float = 180.0,
        patience_s: float | None = None,
    ) -> list[processes.Ended]:
        """Trains on ranks of this machine; each writes its final state to ``folder``. See :func:`processes.run`."""
        block = dict(block or self.block(folder))
        preload = getattr(self.module, "PRELOAD", f"{self.families.partition('.')[0]}.preload")
        return processes.run(
            block["population_size"] * self.setup.member_size,
            train,
            str(folder),
            self,
            block,
            num_steps,
            faults=faults,
            preload=("torch", preload, f"{self.families}.{self.family}", __name__),
            timeout_s=timeout_s,
            patience_s=patience_s,
        )


def uninterrupted(workload: Workload, folder: Path, **checkpoint: Any) -> Path:
    """Runs the workload without faults; returns its folder, ``folder/whole``.

    Raises:
        ClanError: if it fails by itself.
    """
    whole = folder / "whole"
    whole.mkdir()
    ended = workload.launch(whole, block=workload.block(whole, **checkpoint))
    if any(rank.code for rank in ended):
        raise ClanError(f"the run without faults failed, so there is nothing to compare with: {last_words(ended)}")
    return whole


def last_words(ended: Sequence[processes.Ended]) -> str:
    """The last lines of the first rank that ended with an error."""
    number, rank = next((number, rank) for number, rank in enumerate(ended) if rank.code)
    lines = [line for line in rank.text.splitlines() if line.strip()]
    return f"rank {number} ended with {rank.code}: {' / '.join(lines[-3:])}"


def train(folder: str, workload: Workload, block: dict[str, Any], num_steps: int) -> None:
    """A user's script: trains, writes this rank's state and finishes."""
    torch.manual_seed(int(os.environ["RANK"]))
    run = workload.module.start(replace(workload.setup, members=block["population_size"]), block)
    run.train(num_steps)
    world = run.clan.world
    weights = run.weights()
    stood = standing(run.clan) | {
        "weights": digest(weights),
        "finite": all(bool(tensor.isfinite().all()) for tensor in weights.values()),
    }
    member = world.member if world.membership_change is None else world.membership_change.left[world.member]
    Path(folder, f"stood-{member}-{world.at.member_rank}.json").write_text(json.dumps(stood))
    run.clan.finish()


def standing(clan: Any) -> dict[str, str | list[int]]:
    """All state that a resume must restore to the last bit, as text; equal texts mean equal states."""
    with torch.random.fork_rng([]):
        draw = torch.rand(3).tolist()
    state = clan.state()
    found = {
        "state": state_digest(state),
        "scalars": state.scalars,
        "population": clan.population,
        "lineage": [(r.start_step, r.genomes, r.losses, r.donors, r.restored) for r in clan.progress.lineage],
        "draw": draw,
        "next": [sampler.state_dict() for sampler in clan.progress.samplers],
        "counters": clan.backend.counters(),
        "rollback_snapshot": None
        if clan.progress.rollback_snapshot is None
        else [tensor.sum().item() for _, tensor in clan.progress.rollback_snapshot.tensors],
        "phase_snapshot": None
        if clan.progress.phase_snapshot is None
        else [tensor.sum().item() for _, tensor in clan.progress.phase_snapshot.tensors],
        "samples": clan.progress.num_samples,
    }
    return {name: repr(value) for name, value in found.items()}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of all values and names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def stood(folder: Path) -> dict[str, dict[str, Any]]:
    """The final states, by rank (member and rank in the member)."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("stood-*.json"))}


def events(folder: Path, kind: str, run: str = "run") -> list[dict[str, Any]]:
    return [event for event in read_events(folder / run / "events.jsonl") if event["kind"] == kind]
