"""What the backend uses of DeepSpeed beyond its documentation exists in the installed version, and is what it was.

There is no public seam for averaging gradients across engines or for cloning live state. When DeepSpeed is
upgraded, a failure here names what moved before a training run finds out.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.module_inject.layers import DS_TENSOR_MODEL_PARALLEL, TensorParallel_Layer
from deepspeed.moe import utils as moe_utils
from deepspeed.moe.experts import Experts
from deepspeed.runtime import utils as runtime_utils
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.tensor_parallel import init_utils
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import bwc, groups

import clantune_scale
from clantune_scale.backends.deepspeed import DeepSpeedBackend
from clantune_scale.backends.deepspeed import state as training_state
from clantune_scale.backends.deepspeed.pipeline import _RESTORED
from clantune_scale.errors import ConfigError, TopologyError
from tests.backends.small_runs import SGD, batch, ds_config, in_member_worlds, plain_engine
from tests.ranks import run_ranks

# (class, method) -> the parameters that we give, by the names and in the order that we give them
METHODS = {
    (DeepSpeedEngine, "allreduce_bucket"): ["bucket", "dp_group", "dp_world_size"],
    (DeepSpeedEngine, "backward"): ["loss"],
    (DeepSpeedEngine, "eval"): [],
    (DeepSpeedEngine, "fp16_enabled"): [],
    (DeepSpeedEngine, "gradient_accumulation_steps"): [],
    (DeepSpeedEngine, "gradient_clipping"): [],
    (DeepSpeedEngine, "managed_gradient_accumulation"): [],
    (DeepSpeedEngine, "load_checkpoint"): ["load_dir"],
    (DeepSpeedEngine, "set_train_batch_size"): ["train_batch_size"],
    (DeepSpeedEngine, "set_train_micro_batch_size"): ["micro_batch_size"],
    (DeepSpeedEngine, "step"): [],
    (DeepSpeedEngine, "torch_autocast_dtype"): [],
    (DeepSpeedEngine, "torch_autocast_enabled"): [],
    (DeepSpeedEngine, "train_micro_batch_size_per_gpu"): [],
    (DeepSpeedEngine, "zero_offload_optimizer"): [],
    (DeepSpeedEngine, "zero_offload_param"): [],
    (DeepSpeedEngine, "zero_optimization_stage"): [],
    (DeepSpeedZeroOptimizer, "allreduce_bucket"): [
        "bucket", "communication_data_type", "rank", "log", "divide", "process_group",
    ],
    (DeepSpeedZeroOptimizer, "_fill_param_grad_accum_attribute"): ["param"],
    (DeepSpeedZeroOptimizer, "get_gradient_for_reduction"): ["param"],
    (DeepSpeedZeroOptimizer, "reduce_gradients"): [],
    (DeepSpeedZeroOptimizer, "gradient_reduction_w_predivide"): ["tensor", "communication_data_type"],
    (DeepSpeedZeroOptimizer, "update_lp_params"): [],
    (DeepSpeedZeroOptimizer_Stage3, "_partition_all_parameters"): [],
    (DeepSpeedZeroOptimizer_Stage3, "_reassign_or_swap_out_partitioned_parameters"): ["sub_group_id"],
    (DeepSpeedZeroOptimizer_Stage3, "invalidate_secondary_tensor"): [],
    (DeepSpeedZeroOptimizer_Stage3, "partition_grads"): ["params_to_release", "grad_partitions"],
    (BF16_Optimizer, "update_lp_params"): [],
    (DeepSpeedEngine, "autotp_size"): [],
    (PipelineEngine, "_aggregate_total_loss"): [],
    (PipelineEngine, "_next_batch"): [],
    (PipelineEngine, "eval_batch"): ["data_iter"],
    (PipelineEngine, "reset_activation_shape"): [],
    (PipelineEngine, "set_dataloader"): ["loader"],
    (PipelineEngine, "train_batch"): ["data_iter"],
    (bwc, "bwc_pipeline_parallel_world_size"): [],
    (bwc, "bwc_tensor_model_parallel_group"): [],
    (bwc, "bwc_tensor_model_parallel_rank"): [],
    (bwc, "bwc_tensor_model_parallel_world_size"): [],
    (groups, "_get_expert_parallel_group"): [],
    (moe_utils, "is_moe_param"): [],
    (runtime_utils, "is_model_parallel_parameter"): [],
}  # fmt: skip


@pytest.mark.parametrize("owner, name", METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_a_method_takes_what_we_give_it(owner, name):
    method = getattr(owner, name, None)
    assert method is not None, f"deepspeed {deepspeed.__version__}: {owner.__name__} has no method {name} any more"
    given = METHODS[owner, name]
    # DeepSpeed's profiling decorator hides what it wraps in a closure, without functools.wraps.
    method = inspect.getclosurevars(method).nonlocals.get("func", method)
    parameters = list(inspect.signature(method).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    message = f"deepspeed {deepspeed.__version__}: {owner.__name__}.{name} takes {names}, and is given {given}"
    assert names[: len(given)] == given, message
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert {p.name for p in named if p.default is p.empty} <= set(given), message


def test_initialize_takes_what_deepspeeds_takes_in_its_order():
    theirs = list(inspect.signature(deepspeed.initialize).parameters)
    ours = inspect.signature(clantune_scale.initialize).parameters
    assert [name for name, parameter in ours.items() if parameter.kind is not parameter.KEYWORD_ONLY] == theirs


def test_a_loss_scale_has_the_fields_that_members_agree_on():
    scaler = DynamicLossScaler(2.0, 2.0, 1000, 1.0, 2, False)
    assert set(training_state._LOSS_SCALE_FIELDS) <= vars(scaler).keys()
    assert set(training_state._LOSS_SCALE_FIELDS) - {"cur_hysteresis"} <= LossScaleConfig.__dataclass_fields__.keys()


def test_the_optimizer_of_fused_updates_keeps_flat_groups():
    # FusedAdam makes it, which has to be compiled: read, not run.
    source = inspect.getsource(FP16_Optimizer.__init__)
    assert all(f"self.{name} = " in source for name in ("fp16_groups_flat", "fp32_groups_flat", "loss_scale_config"))


def test_the_switch_of_the_compiled_cpu_collectives_is_there():
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


KINDS = {
    "plain": (0, "fp32", {}),
    "FP16_UnfusedOptimizer": (0, "bf16", {}),
    "BF16_Optimizer": (1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}, "optimizer": SGD}),
    "DeepSpeedZeroOptimizer": (2, "fp32", {}),
    "DeepSpeedZeroOptimizer_Stage3": (3, "fp32", {}),
}
ON_ENGINE = ("basic_optimizer", "collate_fn", "data_parallel_group", "device", "dp_world_size", "global_steps")
ON_ENGINE += ("has_moe_layers", "lr_scheduler", "micro_steps", "module", "optimizer")
ON_PARTITION = ("ds_id", "ds_shape", "ds_tensor", "all_gather")
ON_ZERO = ("clip_grad", "gradient_accumulation_steps", "loss_scaler")
ON_OPTIMIZER = {
    "plain": (),
    "FP16_UnfusedOptimizer": ("clip_grad", "fp16_groups", "fp32_groups", "loss_scale_config"),
    "BF16_Optimizer": ("clip_grad", "fp32_groups_flat_partition"),
    "DeepSpeedZeroOptimizer": (
        *ON_ZERO, "dp_process_group", "single_partition_of_fp32_groups", "use_multi_rank_bucket_allreduce",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        *ON_ZERO, "fp16_groups", "fp32_partitioned_groups_flat", "persistent_parameters",
    ),
}  # fmt: skip
REDUCERS = ("engine.allreduce_bucket", "optimizer.allreduce_bucket", "optimizer.partition_grads")


def _listen(owner: Any, name: str, place: str, calls: set[str]) -> None:
    """Notes calls of ``owner.name``."""
    method = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.add(place)
        return method(*args, **kwargs)

    setattr(owner, name, noted)


def _look_at(rank):
    """By kind of optimizer: what the engine and the optimizer hold, and which reducers one step calls."""
    found = {}
    for kind, (stage, dtype, extra) in KINDS.items():
        engine = plain_engine(ds_config(stage, dtype=dtype, clip=0.3, **extra))
        calls: set[str] = set()
        for place in REDUCERS:
            owner, _, name = place.partition(".")
            owner = engine if owner == "engine" else engine.optimizer
            if hasattr(owner, name):
                _listen(owner, name, place, calls)
        engine.backward(engine(*batch(0, 0, rank)))
        engine.step()
        partitioned = next(engine.module.parameters())
        found[kind] = {
            "kind": training_state.optimizer_kind(engine),
            "engine": [name for name in ON_ENGINE if hasattr(engine, name)],
            "optimizer": [name for name in ON_OPTIMIZER[kind] if hasattr(engine.optimizer, name)],
            "groups are one": engine.optimizer.param_groups is engine.basic_optimizer.param_groups,
            "masters are keys": all(
                master in engine.basic_optimizer.state for master in training_state.masters(engine)
            ),
            "calls": calls,
            "clip": (engine._config.gradient_clipping, getattr(engine.optimizer, "clip_grad", None)),
            "partition": [name for name in ON_PARTITION if hasattr(partitioned, name)],
        }
    return found


@pytest.fixture(scope="module")
def looked_at():
    return run_ranks(2, in_member_worlds, _look_at)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_holds_what_we_look_for(kind, looked_at):
    found = looked_at[kind]
    version = f"deepspeed {deepspeed.__version__}, {kind}"
    assert found["kind"] == kind, f"{version}: ZeRO and dtype now make a {found['kind']}"
    assert found["engine"] == list(ON_ENGINE), f"{version}: the engine lacks {set(ON_ENGINE) - set(found['engine'])}"
    lost = set(ON_OPTIMIZER[kind]) - set(found["optimizer"])
    assert not lost, f"{version}: the optimizer lacks {lost}"
    assert found["groups are one"], f"{version}: what is written to the inner groups does not reach the update"
    assert found["masters are keys"], f"{version}: the inner optimizer's state is not kept by these fp32 masters"
    assert found["clip"] in ((0.3, 0.3), (0.3, None)), f"{version}: the clip threshold is kept elsewhere"
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        assert found["partition"] == list(ON_PARTITION)


@pytest.mark.parametrize("kind, place", [
    ("plain", "engine.allreduce_bucket"),
    ("FP16_UnfusedOptimizer", "engine.allreduce_bucket"),
    ("BF16_Optimizer", "engine.allreduce_bucket"),
    ("DeepSpeedZeroOptimizer", "optimizer.allreduce_bucket"),
    ("DeepSpeedZeroOptimizer_Stage3", "optimizer.partition_grads"),
])  # fmt: skip
def test_gradients_are_reduced_where_they_are_shared(kind, place, looked_at):
    assert looked_at[kind]["calls"] == {place}, f"deepspeed {deepspeed.__version__}, {kind}: gradients go another way"


# Read, not run: what the pipeline's own tests run would fail less plainly.
SOURCES = {
    PipelineEngine: [f"self.{name} = " for name in _RESTORED] + ["num_micro_batches=None", "self.global_rank = "],
    PipelineModule: [
        f"self.{name} = " for name in ("tied_comms", "_local_start", "_local_stop", "_layer_specs", "_grid", "stage_id")
    ]
    + ["self.num_stages = ", "self.micro_offset += 1", "p.ds_pipe_replicated = True", "'ranks':", "'weight_attr':"],
    PipelineParallelGrid: ["self.model_parallel_size = ", "self._topo = "],
    TiedLayerSpec: ["self.key = "],
    Experts: ["self.num_local_experts = ", "self.deepspeed_experts = ", "param.group_name = "],
    TensorParallel_Layer: ["weight.gather_params = self.gather_params", "setattr(weight, DS_TENSOR_MODEL_PARALLEL"],
}


@pytest.mark.parametrize("owner", SOURCES, ids=lambda owner: owner.__name__)
def test_a_parallel_part_keeps_what_we_look_for(owner):
    source = inspect.getsource(owner)
    lost = [text for text in SOURCES[owner] if text not in source]
    assert not lost, f"deepspeed {deepspeed.__version__}: {owner.__name__} no longer says {lost}"


def test_names_and_records_of_tensor_parallelism():
    assert DS_TENSOR_MODEL_PARALLEL == "tensor_model_parallel"
    assert init_utils._TP_MODEL_INIT_ARGS is None
    assert '"tp_size": tp_size' in inspect.getsource(init_utils.record_tp_model_init_args)


def engine_with(**changes) -> SimpleNamespace:
    """As much of an engine as is looked at before it is accepted; plain ZeRO 1 where nothing is changed."""
    optimizer = SimpleNamespace(param_groups=[])
    values = {
        "fp16_enabled": False, "zero_optimization_stage": 1, "managed_gradient_accumulation": True,
        "torch_autocast_enabled": False, "torch_autocast_dtype": None,
        "zero_offload_param": None, "zero_offload_optimizer": None, "autotp_size": 0,
    } | changes  # fmt: skip
    plain = {
        "has_moe_layers": False, "optimizer": optimizer, "pipeline_parallelism": False, "sequence_parallel_size": 1,
        "module": torch.nn.Linear(1, 1), "lr_scheduler": None,
    }  # fmt: skip
    plain = {name: values.pop(name, value) for name, value in plain.items()}
    return SimpleNamespace(basic_optimizer=optimizer, **plain, **{k: (lambda v=v: v) for k, v in values.items()})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sequence_parallel_size": 2}, "sequence-parallel degree is 2.*Set sequence_parallel_size to 1"),
        ({"pipeline_parallelism": True, "autotp_size": 2}, "autotp_size is 2 for a pipeline.*Leave it out"),
        (
            {"zero_offload_param": DeepSpeedZeroOffloadParamConfig(device="nvme")},
            r"zero_optimization\.offload_param\.device is nvme.*Set it to cpu or none",
        ),
        (
            {"zero_offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig(device="nvme")},
            r"zero_optimization\.offload_optimizer\.device is nvme.*Set it to cpu or none",
        ),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation is false.*Leave it at its default"),
        ({"fp16_enabled": True, "zero_optimization_stage": 0}, "fp16 with ZeRO stage 0.*to 1 or more, or use bf16"),
        (
            {"torch_autocast_enabled": True, "torch_autocast_dtype": torch.float16},
            "torch_autocast with float16.*dtype to bfloat16",
        ),
        ({"optimizer": SimpleNamespace()}, "wraps the optimizer in SimpleNamespace.*Use one of DeepSpeedZero"),
    ],
)
def test_settings_that_a_clan_cannot_run_under_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        DeepSpeedBackend(engine_with(**changes))


@pytest.mark.parametrize("changes", [
    {},
    {"zero_offload_param": DeepSpeedZeroOffloadParamConfig(device="cpu")},
    {"fp16_enabled": True},
    {"has_moe_layers": True},
    {"pipeline_parallelism": True},
    {"autotp_size": 2},
    {"torch_autocast_enabled": True, "torch_autocast_dtype": torch.bfloat16},
])  # fmt: skip
def test_settings_beside_them_are_accepted(changes):
    DeepSpeedBackend(engine_with(**changes))


def _refused_by_real_engines(rank):
    said = []
    for extra, reduces_by_owner in (({"managed_gradient_accumulation": False}, False), ({}, True)):
        config = ds_config(2, **extra)
        config["zero_optimization"]["use_multi_rank_bucket_allreduce"] = not reduces_by_owner
        try:
            DeepSpeedBackend(plain_engine(config)).share_gradients(lambda: (0, 1), None)
        except ConfigError as error:
            said.append(str(error))
    return said


def test_real_engines_with_such_settings_are_refused():
    unmanaged, by_owner = run_ranks(1, in_member_worlds, _refused_by_real_engines)[0]
    assert "managed_gradient_accumulation is false" in unmanaged
    assert "zero_optimization.use_multi_rank_bucket_allreduce is false" in by_owner and "its default, true" in by_owner


def test_pipelines_and_model_parallel_units_need_the_clan_to_be_joined_before():
    config = ds_config(1) | {"clantune": {"population_size": 2}}
    pipeline = deepspeed.PipelineModule.__new__(deepspeed.PipelineModule)
    for parallel, what in (({"model": pipeline}, "a PipelineModule"), ({"mpu": object()}, "an mpu")):
        with pytest.raises(
            TopologyError, match=rf"{what} was built before the clan.*Call clantune_scale\.join\(config"
        ):
            clantune_scale.initialize(config=config, eval_data=[1], **parallel)
