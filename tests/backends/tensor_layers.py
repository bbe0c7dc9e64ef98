"""A network whole and in shards, its layers in Megatron's manner, and the ``mpu`` that knows their groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# Along which dimension a parameter is sharded; the others are replicated.
DIMENSIONS = {"up.weight": 0, "up.bias": 0, "down.weight": 1}


class Whole(nn.Module):
    """A wide hidden layer around the inputs, then a small one; the forward pass gives the loss in float32."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.up, self.down, self.last = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        inputs = inputs.to(self.last.weight.dtype)
        hidden = inputs + self.down(torch.tanh(self.up(inputs)))
        return (self.last(hidden).float() - targets).square().mean()


class Sharded(Whole):
    """The same with its two wide layers sharded over a tensor group."""

    def __init__(self, mpu: Mpu, seed: int = 0) -> None:
        super().__init__(seed)
        self.up, self.down = ReplicaGroup(self.up, mpu), Row(self.down, mpu)


class Mpu:
    """A model-parallel unit over the default world, ranks ordered [data, tensor], with Megatron's functions.

    Args:
        tp: tensor degree.
    """

    def __init__(self, tp: int) -> None:
        size, rank = dist.get_world_size(), dist.get_rank()
        for begin in range(0, size, tp):
            ranks = list(range(begin, begin + tp))
            group = dist.new_group(ranks)
            if rank in ranks:
                self._tensor = group
        for place in range(tp):
            ranks = list(range(place, size, tp))
            group = dist.new_group(ranks)
            if rank in ranks:
                self._data = group

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_tensor_model_parallel_group(self) -> Any:
        return self._tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size


class _Copied(torch.autograd.Function):
    """The input as it is; its gradient summed over the tensor group."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Summed(torch.autograd.Function):
    """The sum over the tensor group; the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _shard(whole: nn.Parameter, dimension: int, mpu: Mpu) -> nn.Parameter:
    """This rank's part, marked as Megatron marks its own."""
    parts = whole.detach().chunk(mpu.get_tensor_model_parallel_world_size(), dimension)
    shard = nn.Parameter(parts[mpu.get_tensor_model_parallel_rank()].clone())
    shard.tensor_model_parallel, shard.partition_dim, shard.partition_stride = True, dimension, 1
    return shard


class ReplicaGroup(nn.Module):
    """A linear layer whose outputs are sharded."""

    def __init__(self, whole: nn.Linear, mpu: Mpu) -> None:
        super().__init__()
        self.weight, self.bias = _shard(whole.weight, 0, mpu), _shard(whole.bias, 0, mpu)
        self._group = mpu.get_tensor_model_parallel_group()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(_Copied.apply(inputs, self._group), self.weight, self.bias)


class Row(nn.Module):
    """A linear layer whose inputs are sharded; its bias is on every rank."""

    def __init__(self, whole: nn.Linear, mpu: Mpu) -> None:
        super().__init__()
        self.weight, self.bias = _shard(whole.weight, 1, mpu), whole.bias
        self._group = mpu.get_tensor_model_parallel_group()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _Summed.apply(nn.functional.linear(inputs, self.weight), self._group) + self.bias
