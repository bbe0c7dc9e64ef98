"""What the backend uses of Megatron-core beyond its documentation exists in the installed version, and is what it was.

Looked at in a rank that has Megatron loaded; when it is upgraded, a failure here names what moved before a training
run finds out.
"""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import Any

import pytest
import torch

from tests.backends.families import Setup
from tests.backends.families import megatron as family
from tests.ranks import run_ranks

VERSION = metadata.version("megatron-core")
BUCKETS = "distributed.param_and_grad_buffer:_ParamAndGradBucketGroup"
DDP = "distributed:DistributedDataParallel"
PLAIN, HALF, SHARDED = "FP32Optimizer", "Float16OptimizerWithFloat16Params", "DistributedOptimizer"
# owner (in megatron.core), method -> the parameters that we give, by the names and in the order that we give them
METHODS = {
    (BUCKETS, "start_grad_sync"): ["force_all_reduce"],
    (BUCKETS, "finish_grad_sync"): ["force_all_reduce"],
    (BUCKETS, "start_param_sync"): ["force_sync"],
    ("optimizer.optimizer:ChainedOptimizer", "step"): [],
    ("optimizer.optimizer:ChainedOptimizer", "step_with_ready_grads"): [],
    (f"optimizer.optimizer:{PLAIN}", "step_with_ready_grads"): [],
    (f"optimizer.optimizer:{HALF}", "_copy_main_params_to_model_params"): [],
    (f"optimizer.distrib_optimizer:{SHARDED}", "_copy_main_params_to_model_params"): [],
    ("optimizer_param_scheduler:OptimizerParamScheduler", "step"): ["increment"],
    ("num_microbatches_calculator", "reconfigure_num_microbatches_calculator"): [
        "rank", "rampup_batch_size", "global_batch_size", "micro_batch_size", "data_parallel_size",
    ],
    ("tensor_parallel.random:CudaRNGStatesTracker", "get_states"): [],
    ("tensor_parallel.random:CudaRNGStatesTracker", "set_states"): ["states"],
    ("utils", "get_model_config"): ["model"],
    ("utils", "unwrap_model"): ["model"],
    ("distributed", "finalize_model_grads"): ["model", "num_tokens", "pg_collection", "force_all_reduce"],
}  # fmt: skip
# kind of optimizer -> how it comes about
KINDS = {
    PLAIN: Setup(clip=0.5),
    HALF: Setup(dtype="bf16", clip=0.5, is_tied=True),
    SHARDED: Setup(dtype="bf16", clip=0.5, options={"distributed": True}),
}
ON_BUCKETS = {"buckets", "ddp_config", "grad_reduce_handle", "param_gather_handle"}
ON_BUCKET = {"grad_data", "gradient_scaling_factor"}
ON_MODEL = {"bucket_groups", "ddp_config", "dp_group", "expert_parallel_bucket_groups", "pp_group", "tp_group"}
ON_CONFIG = {
    "calculate_per_token_loss", "context_parallel_size", "expert_model_parallel_size", "finalize_model_grads_func",
    "gated_linear_unit", "grad_scale_func",
}  # fmt: skip
ON_DDP_CONFIG = {
    "average_in_collective", "num_distributed_optimizer_instances", "overlap_param_gather", "use_distributed_optimizer",
}  # fmt: skip
ON_OPTIMIZER_CONFIG = {"clip_grad", "optimizer_cpu_offload", "use_precision_aware_optimizer"}


def _owner(path: str) -> Any:
    import importlib

    module, _, name = path.partition(":")
    found = importlib.import_module(f"megatron.core.{module}")
    return getattr(found, name) if name else found


def _signatures() -> dict[tuple[str, str], list[tuple[str, bool]] | None]:
    """Of each method, its parameters and whether each must be given."""
    found = {}
    for path, name in METHODS:
        owner = _owner(path)
        if not hasattr(owner, name):
            found[path, name] = None
            continue
        parameters = list(inspect.signature(getattr(owner, name)).parameters.values())
        parameters = parameters[1:] if inspect.isclass(owner) else parameters
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found[path, name] = [(p.name, p.default is p.empty) for p in named]
    return found


def _missing(owner: Any, names: set[str]) -> set[str]:
    return {name for name in names if not hasattr(owner, name)}


def _look_at() -> dict[str, Any]:
    """What models and optimizers of each kind hold, after one step."""
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    from clantune_scale.backends.megatron import state

    found: dict[str, Any] = {"signatures": _signatures(), "kinds": {}}
    for number, (kind, setup) in enumerate(KINDS.items()):
        run = family.start(setup, None) if number == 0 else family.Megatron(setup, None)
        run.train(1)
        (part,) = run.optimizer.chained_optimizers
        (buckets,) = run.model.bucket_groups
        group = "intra_distributed_optimizer_instance_group" if kind == SHARDED else "data_parallel_group"
        found["kinds"][kind] = {
            "kind": type(part).__name__,
            "missing": _missing(run.model, ON_MODEL)
            | _missing(buckets, ON_BUCKETS | {group})
            | _missing(buckets.buckets[0], ON_BUCKET)
            | _missing(run.model.config, ON_CONFIG)
            | _missing(run.model.ddp_config, ON_DDP_CONFIG)
            | _missing(part.config, ON_OPTIMIZER_CONFIG),
            "masters are keys": all(master in part.optimizer.state for master in state.masters(run.optimizer)),
            "masters are fp32": all(master.dtype == torch.float32 for master in state.masters(run.optimizer)),
            "one config": part.config is run.optimizer.config,
            "groups": [{key: group.get(key) for key in ("wd_mult", "lr_mult")} for group in run.optimizer.param_groups],
            "layer number": run.model.module.decoder.layers[1].layer_number if kind == PLAIN else 2,
        }
    scaler = DynamicGradScaler(256.0, 1.0, 2.0, 0.5, 10, 2)
    found["scaler"] = _missing(scaler, set(state._SCALE.values()))
    return found


@pytest.fixture(scope="module")
def looked_at():
    return run_ranks(1, _look_at, preload=family.PRELOAD)[0]


@pytest.mark.parametrize("owner, name", METHODS)
def test_a_method_takes_what_we_give_it(owner, name, looked_at):
    parameters = looked_at["signatures"][owner, name]
    assert parameters is not None, f"megatron-core {VERSION}: {owner} has no {name} any more"
    given = METHODS[owner, name]
    names = [parameter for parameter, _ in parameters]
    message = f"megatron-core {VERSION}: {owner}.{name} takes {names}, and is given {given}"
    assert set(given) <= set(names), message
    assert {parameter for parameter, is_needed in parameters if is_needed} <= set(given), message


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_its_optimizer_hold_what_we_look_for(kind, looked_at):
    found = looked_at["kinds"][kind]
    version = f"megatron-core {VERSION}, {kind}"
    assert found["kind"] == kind, f"{version}: these settings now make a {found['kind']}"
    assert not found["missing"], f"{version}: {found['missing']} are gone"
    assert found["masters are keys"], f"{version}: the inner optimizer's state is not kept by these fp32 masters"
    assert found["masters are fp32"] and found["one config"]
    assert {group["wd_mult"] for group in found["groups"]} == {0.0, 1.0}
    assert {group["lr_mult"] for group in found["groups"]} == {1.0}
    assert found["layer number"] == 2, f"{version}: layers are not numbered from 1"


def test_a_loss_scale_has_the_fields_that_members_agree_on(looked_at):
    assert looked_at["scaler"] == set()
