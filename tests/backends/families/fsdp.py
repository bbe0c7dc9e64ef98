"""FSDP2, alone and with tensor parallelism, on a small tied language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.backends.families import Setup, join_groups
from tests.backends.families.loops import MICRO, Loop, TiedNet
from tests.backends.families.loops import token_datasets as datasets

__all__ = ["CASES", "LINE_CASES", "MICRO", "TOLERANCE", "datasets", "start", "twin", "twin_loss"]

CASES = {
    "dp": Setup(dp=2, accumulation=2, clip=0.1, is_tied=True),
    "tp": Setup(tp=2, clip=0.1, is_tied=True, is_slow=True),
    "three": Setup(members=3, clip=0.1, is_tied=True, is_slow=True),
    "dp-tp": Setup(dp=2, tp=2, accumulation=2, clip=0.1, is_tied=True, is_slow=True),
    "bf16": Setup(
        dp=2, dtype="bf16", optimizer="sgd", clip=0.1, is_tied=True, is_slow=True, options={"reduce": torch.float32}
    ),
    "bf16-reduced": Setup(
        dp=2, dtype="bf16", optimizer="sgd", clip=0.1, is_tied=True, is_slow=True, options={"reduce": torch.bfloat16}
    ),
    "compiled": Setup(dp=2, accumulation=2, clip=0.1, is_tied=True, is_slow=True, options={"compile": "aot_eager"}),
}
# A clan of groups refuses these.
LINE_CASES = {
    "hybrid": Setup(dp=2, accumulation=2, clip=0.1, is_tied=True, options={"replicas": 2}),
    "half": Setup(
        dp=2, dtype="bf16", optimizer="sgd", clip=0.1, is_tied=True, is_slow=True, options={"has_masters": False}
    ),
    "offload": Setup(dp=2, clip=0.1, is_tied=True, is_slow=True, options={"offload": True}),
}
# Two summation orders in float32, and AdamW's division by small second moments; bf16 rounds sums of gradients.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-3}


class Sharded(Loop):
    """A loop over a model under ``fully_shard``."""

    @contextmanager
    def exchanging(self, is_last: bool) -> Iterator[None]:
        self.model.set_requires_gradient_sync(is_last)
        yield

    def weights(self) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            found = {name.removeprefix("_orig_mod."): p for name, p in self.model.named_parameters()}
            # Where one rank holds all, the whole tensor is the live one.
            return {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in found.items()}


def start(setup: Setup, block: dict | None) -> Sharded:
    join_groups(block)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if "replicas" in setup.options:
        shape = (setup.options["replicas"], dist.get_world_size() // setup.options["replicas"])
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "dp"))
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size() // setup.tp, setup.tp), mesh_dim_names=("dp", "tp"))
    model = sharded(setup, TiedNet() if setup.options.get("has_masters", True) else TiedNet().bfloat16(), mesh)
    if "compile" in setup.options:
        model = torch.compile(model, backend=setup.options["compile"])
    return Sharded(setup, model, block, datasets())


def sharded(setup: Setup, model: TiedNet, mesh: Any) -> nn.Module:
    if setup.tp > 1:
        parallelize_module(model.mlp, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    options: dict[str, Any] = {"mesh": mesh if "replicas" in setup.options else mesh["dp"]}
    if setup.options.get("offload"):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if "reduce" in setup.options:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, setup.options["reduce"])
    fully_shard(model.mlp, **options)
    return fully_shard(model, **options)


def twin() -> nn.Module:
    return TiedNet()


def twin_loss(module: nn.Module, batch: Any) -> torch.Tensor:
    return module(*batch)
