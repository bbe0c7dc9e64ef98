"""DDP on a small network, in buckets so small that there are several."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.backends.families import Setup, join_groups
from tests.backends.families.loops import MICRO, Loop
from tests.backends.small_runs import Net
from tests.small_clans import datasets

__all__ = ["CASES", "LINE_CASES", "MICRO", "TOLERANCE", "datasets", "start", "twin", "twin_loss"]

CASES = {
    "dp": Setup(dp=2, accumulation=2, clip=0.5),
    "three": Setup(members=3, is_slow=True),
    "compiled": Setup(dp=2, clip=0.5, is_slow=True, options={"compile": "aot_eager"}),
}
# A clan of groups refuses these. Two ranks, because the sum of two numbers has one order only, in 16 bits as well.
LINE_CASES = {
    "half": Setup(dtype="bf16", optimizer="sgd", clip=0.5, is_slow=True, options={"has_masters": False}),
}
# Two summation orders in float32, and AdamW's division by small second moments.
TOLERANCE = {"fp32": 2e-6}
# One step of regrouped sums over four ranks, and AdamW on it for four more.
RESUME_TOLERANCE = 2e-6
BUCKET_MB = 2e-3


class Replicated(Loop):
    """A loop over a model under DDP."""

    def exchanging(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self.model.no_sync()

    def weights(self) -> dict[str, torch.Tensor]:
        found = {name.replace("_orig_mod.", "").replace("module.", ""): p for name, p in self.model.named_parameters()}
        return {name: parameter.detach().clone() for name, parameter in found.items()}


def start(setup: Setup, block: dict | None) -> Replicated:
    join_groups(block)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if "compile" in setup.options:
        # Compiled graphs are cut at DDP's buckets, which must not be smaller than its first one.
        model = torch.compile(DistributedDataParallel(Net()), backend=setup.options["compile"])
    else:
        net = Net() if setup.options.get("has_masters", True) else Net().bfloat16()
        model = DistributedDataParallel(net, bucket_cap_mb=BUCKET_MB)
    return Replicated(setup, model, block, datasets())


def twin() -> nn.Module:
    return Net()


def twin_loss(module: nn.Module, batch: Any) -> torch.Tensor:
    return module(*batch)
