from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from clantune_scale.distributed import world
from clantune_scale.distributed.self_check import check_parameters, check_world, parameter_layout
from clantune_scale.errors import DivergenceError
from tests.backends.small_runs import Net, ds_config, in_member_worlds, member_engine
from tests.ranks import RankError, free_port, run_ranks


def build(kind: str) -> nn.Module:
    module = Net()
    if kind == "wider":
        module.second = nn.Linear(24, 25)
    elif kind == "half":
        module.second.weight = nn.Parameter(module.second.weight.detach().bfloat16())
    elif kind == "frozen":
        module.second.weight.requires_grad_(False)
    elif kind == "named otherwise":
        module.add_module("middle", module.second)
        del module.second
    elif kind == "longer":
        module.extra = nn.Linear(1, 1)
    return module


def _check_parameters(kinds):
    clan = world.join(len(kinds), timeout_s=30)
    try:
        check_parameters(clan, build(kinds[clan.member]))
        said = ""
    except DivergenceError as error:
        said = str(error)
    clan.replica_group.gather_json(None)
    return said


@pytest.mark.parametrize(
    "kinds, expected",
    [
        (["plain", "plain"], ""),
        (["plain", "plain", "wider"], "member 2 has ['second.weight', [25, 24], 'torch.float32', True], and member 0 "
                                      "has ['second.weight', [24, 24], 'torch.float32', True]. Build the same model"),
        pytest.param(
            ["plain", "half"], "member 1 has ['second.weight', [24, 24], 'torch.bfloat16', True], and",
            marks=pytest.mark.slow,
        ),
        (["plain", "frozen"], "member 1 has ['second.weight', [24, 24], 'torch.float32', False], and"),
        pytest.param(
            ["plain", "named otherwise"], "and member 0 has ['second.weight', ", marks=pytest.mark.slow
        ),
        (["plain", "longer"], "member 1 has 8 parameters, and member 0 has 6 parameters. Build the same model"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_member_with_another_model_is_named_with_its_first_parameter_that_differs(kinds, expected):
    for said in run_ranks(len(kinds), _check_parameters, kinds):
        assert expected in said and bool(said) == bool(expected)


def _layout(rank):
    _, backend = member_engine(ds_config(3), 1)
    return parameter_layout(backend.module)


def test_partitioned_parameters_have_their_whole_shapes():
    expected = [[name, list(p.shape), "torch.float32", True] for name, p in Net().named_parameters()]
    assert run_ranks(2, in_member_worlds, _layout) == [expected] * 2


def _own_world():
    clan = world.join(2, timeout_s=30)
    dist.init_process_group("gloo")
    check_world(clan, torch.device("cpu"))
    dist.barrier()
    dist.destroy_process_group()
    return clan.member


def _leaked_world(port):
    """The ranks' launch variables come back after joining, as a launcher's own set-up might do."""
    launched = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    clan = world.join(2, timeout_s=30)
    os.environ.update(launched, MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    check_world(clan, torch.device("cpu"))


def _crossed_world(port):
    """Worlds of the right size that hold ranks of both members."""
    rank = int(os.environ["RANK"])
    clan = world.join(2, timeout_s=30)
    os.environ.update(RANK=str(clan.member), WORLD_SIZE="2", MASTER_PORT=str(port[rank % 2]))
    dist.init_process_group("gloo")
    check_world(clan, torch.device("cpu"))


def test_a_members_own_world_passes():
    assert run_ranks(4, _own_world) == [0, 0, 1, 1]


def test_a_process_group_of_all_ranks_is_found():
    message = r"DivergenceError: member \d should be a world of 2 ranks, .* group has 4 with members that sum to 2"
    with pytest.raises(RankError, match=message):
        run_ranks(4, _leaked_world, free_port())


def test_a_process_group_of_other_members_ranks_is_found():
    message = r"DivergenceError: member \d should be .* group has 2 with members that sum to 1 in place of [02]\. Let"
    with pytest.raises(RankError, match=message):
        run_ranks(4, _crossed_world, [free_port(), free_port()])
