"""Norms and clipping over mixed meshes, against torch's own on one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from clantune_scale.gradients.clip import clip_grad_norm_
from tests.backends.families import Setup
from tests.backends.families.fsdp import datasets, sharded
from tests.backends.families.loops import MICRO, TiedNet
from tests.backends.small_runs import in_member_worlds
from tests.ranks import run_ranks

MAX_NORM = 0.1


def _clip(rank: int) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = sharded(Setup(dp=2, tp=2), TiedNet(), mesh)
    begin = MICRO * (rank // 2)
    model(*datasets()[0][begin : begin + MICRO]).backward()
    norm = clip_grad_norm_(model.parameters(), MAX_NORM)
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    return float(norm), gradients, sorted({parameter.grad.device_mesh.ndim for parameter in model.parameters()})


def test_the_norm_over_two_meshes_is_that_of_the_whole_model():
    model = TiedNet()
    model(*datasets()[0][: 2 * MICRO]).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    assert norm > 2 * MAX_NORM
    for found, gradients, meshes in run_ranks(4, in_member_worlds, _clip):
        assert meshes == [1, 2]
        # Float32 sums of some hundred squares in two orders.
        assert abs(found - norm.item()) < 1e-5 * norm.item()
        for name, parameter in model.named_parameters():
            assert (gradients[name] - parameter.grad).abs().max() < 1e-6


def test_without_a_threshold_nothing_is_scaled():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 0.0, 4.0])
    assert clip_grad_norm_([parameter], 0.0) == 5.0
    assert parameter.grad.tolist() == [3.0, 0.0, 4.0]
