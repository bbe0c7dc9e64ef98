"""DeepSpeed members whose layers are Megatron-core's own, its ``parallel_state`` behind their ``mpu``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import clantune_scale
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader, StepPlan
from tests.backends.families.deepspeed_tp import TensorParallel
from tests.backends.small_runs import MICRO, ds_config
from tests.backends.tensor_layers import DIMENSIONS, Whole
from tests.ranks import run_ranks
from tests.small_clans import datasets


def _mpu() -> Any:
    """Megatron-core's functions, those that it no longer has under the names that DeepSpeed calls."""
    from megatron.core import parallel_state

    functions = {name: getattr(parallel_state, name) for name in dir(parallel_state) if name.startswith("get_")}
    for name in ("group", "rank", "world_size"):
        functions[f"get_model_parallel_{name}"] = functions[f"get_tensor_model_parallel_{name}"]
    return SimpleNamespace(**functions)


def _model() -> torch.nn.Module:
    """The twin with its two wide layers in the place of which Megatron's are put, with its weights."""
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    class First(torch.nn.Module):
        """Megatron's layers return their bias beside the output, where it is not added."""

        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer
            self.weight, self.bias = layer.weight, layer.bias

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.layer(inputs)[0]

    config = ModelParallelConfig(tensor_model_parallel_size=2, use_cpu_initialization=True)
    common = {"config": config, "init_method": torch.nn.init.zeros_, "bias": True, "skip_bias_add": False}
    model = Whole()
    up = ColumnParallelLinear(16, 24, gather_output=False, **common)
    down = RowParallelLinear(24, 16, input_is_parallel=True, **common)
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, layer in (("up", up), ("down", down)):
            for kind, parameter in layer.named_parameters():
                whole = getattr(getattr(model, name), kind)
                dimension = DIMENSIONS.get(f"{name}.{kind}")
                parameter.copy_(whole if dimension is None else whole.chunk(2, dimension)[rank])
    model.up, model.down = First(up), First(down)
    return model


def _run(block: dict | None) -> dict[str, torch.Tensor]:
    """Eight steps with ZeRO 1; in a member's world with a clan, on all ranks without one."""
    import deepspeed
    from megatron.core import parallel_state

    from tests import megatron_shim

    megatron_shim.install()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if block is not None:
        clantune_scale.join(block["population_size"])
    deepspeed.init_distributed("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, create_gloo_process_groups=False)
    model = _model()
    config = ds_config(1, accumulation=2, clip=0.5)
    options = {"model": model, "model_parameters": model.parameters(), "mpu": _mpu()}
    train, valid = datasets()
    if block is not None:
        config["clantune"] = block
        engine, _, loader, _ = clantune_scale.initialize(**options, config=config, training_data=train, eval_data=valid)
    else:
        engine = deepspeed.initialize(**options, config=config)[0]
        sampler = ClanBatchSampler(
            len(train),
            seed=0,
            micro_batch_size=MICRO,
            dp_size=engine.dp_world_size,
            dp_rank=dist.get_rank(engine.data_parallel_group),
            member=0,
            population_size=1,
            plan=lambda step: StepPlan(False, 2, 2),
        )
        loader = ClanDataLoader(train, sampler)
    run = TensorParallel(engine, loader)
    run.train(8)
    weights = run.weights()
    dist.barrier()
    dist.destroy_process_group()
    return weights


@pytest.mark.slow
def test_megatrons_layers_under_deepspeed_share_as_plain_data_parallelism_does(tmp_path):
    flat = run_ranks(4, _run, None)
    block = {
        "population_size": 2,
        "round_length": 5,
        "strategy": "control",
        "total_steps": 8,
        "fitness": {"num_samples": 32, "batch_size": 4},
        "tracking": {"directory": str(tmp_path), "mlflow": False, "print_every_steps": 1000},
    }
    clan = run_ranks(4, _run, block)
    initial = dict(Whole().named_parameters())
    assert flat[0].keys() == clan[0].keys() == initial.keys()
    for weights in clan:
        for name, expected in flat[0].items():
            # Two summation orders in float32, and AdamW's division by small second moments.
            assert (weights[name] - expected).abs().max() < 2e-6, name
    assert all((flat[0][name] - initial[name]).abs().max() > 1e-3 for name in initial)
