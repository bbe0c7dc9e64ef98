"""A user's own training script, from the README alone: FSDP2, two members, a few rounds."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

import clantune_scale

config = {
    "population_size": 2,
    "round_length": 4,
    "fitness": {"num_samples": 16, "batch_size": 8},
    "tracking": {"directory": sys.argv[1], "run_name": "mine"},
}
clantune_scale.join(config)
dist.init_process_group("gloo")
torch.manual_seed(0)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.layers(inputs), targets)


inputs = torch.randn(256, 8)
targets = inputs.sum(1, keepdim=True)
train, validation = TensorDataset(inputs[:192], targets[:192]), TensorDataset(inputs[192:], targets[192:])
model = Net()
fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
clan = clantune_scale.attach(model, optimizer, config=config, eval_data=validation, micro_batch_size=4)
for step in clan.steps(clan.loader(train), until=12):
    for batch in step:
        (model(*batch) / len(step)).backward()
    optimizer.step()
    optimizer.zero_grad()
clan.finish()
dist.destroy_process_group()
