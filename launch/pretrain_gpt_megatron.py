"""Pretrains a byte-level GPT of Megatron-core's as a clan, members tensor- and pipeline-parallel.

torchrun --nproc_per_node 8 launch/pretrain_gpt_megatron.py --config configs/megatron.json --tensor 2
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt import VOCABULARY
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from training import add_arguments, forever, load_corpus

import clantune_scale


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrains a byte-level GPT with Megatron-core.")
    parser.add_argument("--config", type=Path, required=True, help='JSON file: batch sizes and the "clantune" block')
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks of a member")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages of a member")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--distributed_optimizer", action="store_true", help="shard it over data parallelism")
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Trains, then prints the champion's test loss."""
    arguments = parse_arguments()
    settings, _ = clantune_scale.load_config(arguments.config)
    world = clantune_scale.join(arguments.config)
    # From here on the world is the member's, and Megatron's groups are cut from it.
    start_megatron(arguments)
    model = build_model(arguments)
    optimizer, scheduler = build_optimizer(arguments, model, clip=settings.get("gradient_clipping", 0.0))
    corpus = load_corpus(arguments)
    clan = clantune_scale.attach_megatron(
        model,
        optimizer,
        scheduler,
        config=arguments.config,
        forward_step=forward_step,
        seq_length=arguments.context,
        eval_data=corpus.validation,
        num_samples=len(corpus.train),
    )
    batches = forever(clan.loader(corpus.train))
    while clan.num_steps < arguments.steps:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=clan.num_microbatches,
            seq_length=arguments.context,
            micro_batch_size=clan.micro_batch_size,
        )
        is_updated, *_ = optimizer.step()
        if is_updated:
            scheduler.step(increment=1)
    summary = clan.finish()
    loss = clan.evaluate(corpus.test, num_samples=arguments.test_windows)[summary.champion]
    if world.is_clan_leader:
        print(f"test loss {loss:.4f} nats per byte", flush=True)
    dist.destroy_process_group()


def start_megatron(arguments: argparse.Namespace) -> None:
    """Process groups, in the world that the clan left: the member's."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=arguments.tensor,
        pipeline_model_parallel_size=arguments.pipeline,
        create_gloo_process_groups=False,
    )
    torch.manual_seed(arguments.seed)
    model_parallel_cuda_manual_seed(arguments.seed)


def build_model(arguments: argparse.Namespace) -> DistributedDataParallel:
    """This rank's part of the model, the output layer tied to the embedding."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.width,
        num_attention_heads=arguments.heads,
        hidden_dropout=arguments.dropout,
        attention_dropout=arguments.dropout,
        tensor_model_parallel_size=arguments.tensor,
        pipeline_model_parallel_size=arguments.pipeline,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=arguments.bf16,
        # These need Apex or Transformer Engine.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    module = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="LayerNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=arguments.context,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
    ).cuda()
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=arguments.distributed_optimizer, grad_reduce_in_fp32=True
    )
    model = DistributedDataParallel(config, settings, Float16Module(config, module) if arguments.bf16 else module)
    model.broadcast_params()
    return model


def build_optimizer(
    arguments: argparse.Namespace, model: DistributedDataParallel, *, clip: float
) -> tuple[Any, OptimizerParamScheduler]:
    """AdamW at a constant rate: the clan finds the schedule."""
    settings = OptimizerConfig(
        lr=arguments.lr,
        weight_decay=0.1,
        adam_beta2=0.95,
        clip_grad=clip,
        bf16=arguments.bf16,
        params_dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
        use_distributed_optimizer=arguments.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    model.config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=arguments.lr,
        max_lr=arguments.lr,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=arguments.steps,
        lr_decay_style="constant",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=arguments.steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def forward_step(data_iterator: Iterator[Tensor], model: DistributedDataParallel) -> tuple[Tensor, Any]:
    """One micro-batch on this stage; the schedule calls the second of the two on the last stage."""
    window = next(data_iterator).to(torch.cuda.current_device(), non_blocking=True)
    tokens, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    length = tokens.shape[1]
    positions = torch.arange(length, device=window.device).expand_as(tokens)
    # True where a byte may not be seen.
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=window.device).triu(1)
    return model(tokens, positions, mask, labels=labels), mean_loss


def mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a micro-batch, from ``losses``: [batch, time]."""
    loss = losses.float().mean()
    return loss, {"lm loss": loss.detach().clone()}


if __name__ == "__main__":
    main()
