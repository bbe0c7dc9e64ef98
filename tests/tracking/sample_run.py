"""Events of a small run as the clan emits them, for the tests of everything that consumes events."""

from __future__ import annotations

from clantune_scale.config.batch import split_batch
from clantune_scale.config.gene_catalogue import build_gene
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Genome
from clantune_scale.core.rounds import Phase, PhaseKind

ROUND_STEPS = 10
MEMBERS = 2


def start(config: ClanConfig) -> dict:
    """Fields of ``run_start``."""
    return {
        "run_id": "run-1",
        "name": "sample",
        "population_size": MEMBERS,
        "member_ranks": [[0, 1], [2, 3]],
        "topology": {"dp": 2, "tp": 1, "pp": 1},
        "strategy": config.strategy.name,
        "genes": genes(config),
        "config": config,
        "batch": split_batch({"train_batch_size": 32}, population_size=MEMBERS, dp_size=2)[1],
        "versions": {"torch": "2.13.0"},
        "total_steps": 30,
        "resumed_from": None,
    }


def genes(config: ClanConfig) -> tuple:
    """The config's genes, with plausible values found."""
    return tuple(build_gene(name, entry, found=0.1) for name, entry in config.genes.items())


def round_end(config: ClanConfig, index: int) -> dict:
    """Fields of ``round_end``: member 0 is the donor of member 1."""
    genome = Genome.initial(genes(config))
    phases = [Phase(PhaseKind.COOPERATIVE, ROUND_STEPS - 2), Phase(PhaseKind.COMPETITIVE, 2)]
    return {
        "round": index,
        "start_step": index * ROUND_STEPS,
        "phases": phases,
        "members": [
            {
                "member": member,
                "loss": 3.0 - index + 0.1 * member,
                "standard_error": 0.01,
                "genome": genome,
                "donor": 0,
                "reason": "best" if member == 0 else "clone of 0",
                "next_genome": genome,
            }
            for member in range(MEMBERS)
        ],
        "consensus": dict(genome.values),
        "restored": False,
        "seconds": {"cooperative": 1.5, "competitive": 0.5, "evaluation": 0.25, "transfer": 0.125},
        "lr_factor": 1.0,
        "learning_rates": [1e-3, 2e-3],
        "scheduled_rate": 1e-3,
    }


def emit_all(tracking, config: ClanConfig, *, rounds: int = 2) -> None:
    """A whole run through ``tracking``, up to but without its end."""
    tracking.emit("run_start", 0, **start(config))
    for index in range(rounds):
        step = (index + 1) * ROUND_STEPS
        fields = {"round": index, "phase": "competitive", "loss": 4.0 - index, "step_s": 0.1, "samples": 32 * step}
        tracking.emit("step", step, **fields)
        tracking.emit("round_end", step, **round_end(config, index))
