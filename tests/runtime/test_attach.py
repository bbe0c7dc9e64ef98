"""What all ways of attaching ask of an engine: the facts on which default genes depend."""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch

from clantune_scale.config.deepspeed_file import parse_block
from clantune_scale.config.default_genes import ADAMW, genes_of
from clantune_scale.runtime.attach import optimizer_facts
from tests.ranks import run_ranks


def test_engines_say_which_of_their_groups_decay():
    config = parse_block({"population_size": 4})
    for decays, genes in (([0.0, 0.1], ["lr", "weight_decay"]), ([0.0], ["lr"])):
        groups = [{"weight_decay": decay} for decay in decays]
        backend = SimpleNamespace(pp_size=1, update_rule=lambda: ADAMW, param_groups=lambda groups=groups: groups)
        rule, found = optimizer_facts(backend)
        assert list(genes_of(config, sees_samples_once=True, optimizer=rule, weight_decays=found)) == genes


def _stages() -> list[tuple[str, list[float]]]:
    """Two pipeline stages: one without decay, one with; then one of another optimizer, and one without any."""
    torch.distributed.init_process_group("gloo")
    rank, said = int(os.environ["RANK"]), []
    for rules, decays in (((ADAMW, ADAMW), (0.0, 0.1)), ((ADAMW, "sgd"), (0.1, 0.1)), ((ADAMW, ""), (0.1, None))):
        groups = [] if decays[rank] is None else [{"weight_decay": decays[rank]}]
        backend = SimpleNamespace(
            pp_size=2,
            device=torch.device("cpu"),
            update_rule=lambda rule=rules[rank]: rule,
            param_groups=lambda groups=groups: groups,
        )
        said.append(optimizer_facts(backend))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return said


def test_pipeline_stages_agree_on_their_optimizer():
    assert run_ranks(2, _stages) == [[(ADAMW, [0.1]), ("mixed", [0.1]), (ADAMW, [0.1])]] * 2
