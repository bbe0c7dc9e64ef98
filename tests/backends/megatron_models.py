"""Megatron-core's GPT as the tests build it: the twin's weights in it, cut for this rank, and read out again."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from tests.backends.families import Setup
from tests.backends.plain_gpt import CONTEXT, HEADS, LAYERS, VOCABULARY, WIDTH, PlainGPT


def initialize(setup: Setup) -> None:
    """The process group and Megatron's own, in the world at hand; made once, for several runs in one process."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=setup.tp,
        pipeline_model_parallel_size=setup.pp,
        create_gloo_process_groups=False,
    )
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)


def transformer_config(setup: Setup) -> Any:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[setup.dtype]
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        add_bias_linear=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=setup.tp,
        pipeline_model_parallel_size=setup.pp,
        sequence_parallel=setup.options.get("sequence_parallel", False),
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=setup.dtype == "bf16",
        fp16=setup.dtype == "fp16",
        hidden_dropout=setup.options.get("dropout", 0.0),
        attention_dropout=setup.options.get("dropout", 0.0),
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=setup.options.get("per_token", False),
        gated_linear_unit=setup.options.get("gated", False),
        finalize_model_grads_func=finalize_model_grads,
    )


def build(setup: Setup) -> tuple[Any, Any]:
    """Megatron's model in its data parallelism with the twin's weights, and its optimizer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    config = transformer_config(setup)
    module = GPTModel(
        config,
        _layer_spec(config),
        vocab_size=VOCABULARY,
        max_sequence_length=CONTEXT,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=setup.is_tied,
    )
    if not setup.options.get("gated", False):
        load(module, PlainGPT(is_tied=setup.is_tied, seed=setup.options.get("seed", 0)).state_dict())
    is_distributed, overlaps, gathers_late = (
        setup.options.get(name, False) for name in ("distributed", "overlap", "late_gather")
    )
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=is_distributed,
            overlap_grad_reduce=overlaps,
            overlap_param_gather=gathers_late,
            grad_reduce_in_fp32=True,
            bucket_size=2000 if overlaps else None,
        ),
        Float16Module(config, module) if setup.dtype != "fp32" else module,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam" if setup.optimizer == "adamw" else "sgd",
            lr=setup.lr,
            min_lr=0.0,
            weight_decay=0.01 if setup.optimizer == "adamw" else 0.0,
            adam_beta2=0.95,
            clip_grad=setup.clip,
            use_distributed_optimizer=is_distributed,
            overlap_param_gather=gathers_late,
            bf16=config.bf16,
            fp16=config.fp16,
            initial_loss_scale=setup.options.get("loss_scale", 2.0**32),
            hysteresis=1,
            params_dtype=config.params_dtype,
        ),
        [model],
        use_gloo_process_groups=False,
    )
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = model.no_sync if overlaps else None
    return model, optimizer


class SequenceParallelNorm(torch.nn.LayerNorm):
    """What Apex's and Transformer Engine's norms tell Megatron: each rank sees a part of the sequence."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def _layer_spec(config: Any) -> Any:
    """Megatron's own layers; with sequence parallelism, for which it has no norm on the CPU, with one of ours."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    spec = get_gpt_layer_local_spec(normalization="LayerNorm")
    if not config.sequence_parallel:
        return spec
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = SequenceParallelNorm
    return TransformerBlockSubmodules([spec] * get_num_layers_to_build(config), SequenceParallelNorm)


def scheduler_of(setup: Setup, optimizer: Any) -> Any:
    """Megatron's schedule with a falling rate, where the setup asks for one."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    if not setup.options.get("scheduled", False):
        return None
    return OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=setup.lr, min_lr=0.0, lr_warmup_steps=2, lr_decay_steps=40,
        lr_decay_style="cosine", start_wd=0.01, end_wd=0.01, wd_incr_steps=40, wd_incr_style="constant",
    )  # fmt: skip


def _whole_name(name: str) -> str:
    """A parameter's name on this stage, in the whole model: Megatron spreads the layers evenly."""
    from megatron.core import parallel_state

    offset = parallel_state.get_pipeline_model_parallel_rank() * (
        LAYERS // parallel_state.get_pipeline_model_parallel_world_size()
    )
    name = re.sub(r"^(module\.)+", "", name)
    return re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) + offset}", name)


@torch.no_grad()
def load(module: torch.nn.Module, whole: dict[str, torch.Tensor]) -> None:
    """Gives this rank its part of a whole model's weights."""
    from megatron.core import parallel_state

    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in module.named_parameters():
        name = _whole_name(name)
        # The last stage's copy of a tied embedding.
        full = whole.get(name, whole["embedding.word_embeddings.weight"])
        if getattr(parameter, "tensor_model_parallel", False):
            full = full.chunk(size, dim=parameter.partition_dim)[rank]
        parameter.copy_(full)


@torch.no_grad()
def master_weights(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Every fp32 weight of the member on all its ranks, gathered independently of the backend."""
    from megatron.core import parallel_state

    mine = {}
    for name, parameter in model.named_parameters():
        # A tied embedding's copy in the last stage has the same shape under another name: it is compared too.
        full = _master(model, optimizer, parameter)
        if getattr(parameter, "tensor_model_parallel", False):
            shards = [torch.empty_like(full) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
            dist.all_gather(shards, full.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
            full = torch.cat(shards, dim=parameter.partition_dim)
        mine["copy" if getattr(parameter, "shared", False) else _whole_name(name)] = full
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found: dict[str, torch.Tensor] = {}
    for weights in everyone:
        for name, tensor in weights.items():
            assert torch.equal(found.setdefault(name, tensor), tensor), f"{name} differs inside the member"
    if "copy" in found:
        assert torch.equal(found.pop("copy"), found["embedding.word_embeddings.weight"])
    return found


def _master(model: Any, optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole fp32 weight behind a parameter of this rank."""
    if not model.ddp_config.use_distributed_optimizer:
        return getattr(parameter, "main_param", parameter).detach().clone()
    full = torch.zeros(parameter.numel())
    for part in optimizer.chained_optimizers:
        for models, mains in (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ):
            for inside, main in zip(chain(*models), chain(*mains), strict=True):
                if inside is parameter:
                    place = part._get_model_param_range_map(parameter)["param"]
                    full[place.start : place.end] = main.detach()
    dist.all_reduce(full, group=model.dp_group)
    return full.view(parameter.shape)
