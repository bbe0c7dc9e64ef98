"""Public DeepSpeed configs and what is right to say of each: their values, re-written here,
without what changes nothing.

Each has its repository and file. Files that leave the batch to another library ("auto") are there a second time with
numbers, as a user writes them who joins a clan.
"""

from __future__ import annotations

from tests.planning.public_parts import (
    ADAMW,
    ALPACA,
    ALST,
    AUTO,
    AXOLOTL,
    BING,
    BING_ADAM,
    BLOOM,
    BOTH_AUTO,
    DECAY,
    DOLLY,
    FACTORY,
    FACTORY_ZERO,
    FILLED,
    FROM_MEMORY,
    HF_2,
    INFINITY,
    LAMB,
    LLAVA,
    LORA_2,
    MEGATRON,
    NEOX,
    NEOX_ZERO,
    NO_BATCH,
    NO_SCALE,
    OFFLOADED,
    ONE_BIT,
    PRINTS,
    STAGE_2,
    STAGE_3,
    WARMUP,
    Case,
    batch,
    optimizer,
    scaled,
    scheduler,
)

CASES = (
    Case("huggingface/transformers tests/deepspeed/ds_config_zero2.json", {**HF_2, **batch()}, 8, None, NO_BATCH,
        FILLED),
    Case("... with numbers", {**HF_2, **batch(64, 4, 2)}, 8, (16, 4, 2, 2), warnings=FILLED),
    Case("tatsu-lab/stanford_alpaca configs/default_offload_opt_param.json", {**ALPACA, **batch()}, 8, None,
        NO_BATCH, FILLED),
    Case("... with numbers", {**ALPACA, **batch(64, 4, 2)}, 8, (16, 4, 2, 2), warnings=FILLED),
    Case(
        "EleutherAI/gpt-neox configs/base_deepspeed.json",
        {**NEOX, **batch(256, None, 1), **optimizer("Adam", lr=0.00015), "zero_optimization": {"stage": 2,
        **NEOX_ZERO}},
        8, (64, 32, 1, 2),
    ),
    Case(
        "EleutherAI/gpt-neox configs/1bit_deepspeed.json",
        {**NEOX, **batch(256, None, 1), **optimizer("OneBitAdam", **ONE_BIT), "zero_optimization": {"stage": 1,
        **NEOX_ZERO}},
        8, (64, 32, 1, 2), ("OneBitAdam",),
    ),
    Case(
        "EleutherAI/gpt-neox configs/deepspeed_zero1.json",
        {**NEOX, **batch(320, None, 20), **optimizer("OneBitAdam", **ONE_BIT), "zero_optimization": {"stage": 1,
        **NEOX_ZERO}},
        16, (80, 1, 20, 4), ("OneBitAdam",),
    ),
    Case(
        "EleutherAI/gpt-neox configs/deepspeed_configs/ds_config.json",
        {
            **batch(224, 4, None), "gradient_clipping": 1.0, "fp16": scaled(power=None),
            **optimizer("Adam", lr=0.00015, max_grad_norm=1.0, betas=[0.9, 0.95]),
        },
        8, (56, 4, 7, 2), ("optimizer.params.max_grad_norm is set", NO_SCALE),
    ),
    Case(
        "microsoft/Megatron-DeepSpeed examples_deepspeed/rebase/ds_config_gbs256_mbs8_log1_zero1.json",
        {**batch(256, 8, None), **MEGATRON, "zero_optimization": {"stage": 1}}, 32, (64, 8, 1, 8),
    ),
    Case(
        "microsoft/Megatron-DeepSpeed examples_deepspeed/sequence_parallel/ds_config_gbs256_mbs8_log1_zero3.json",
        {**batch(256, 8, None), **MEGATRON, "zero_optimization": {"stage": 3}}, 16, (64, 8, 2, 4),
    ),
    Case(
        "microsoft/Megatron-DeepSpeed examples/MoE/ds_config_gpt3-0.125B-tokendropping-...json",
        {
            **batch(256, 4, None), **MEGATRON, "zero_optimization": {"stage": 0, "elastic_checkpoint": True},
            "bf16": {"enabled": False}, "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"},
        },
        64, (64, 4, 1, 16), ("'curriculum_learning' was removed", NO_SCALE),
    ),
    Case(
        "bigscience-workshop/bigscience train/tr11-176B-ml/tr11-176B-ml.slurm", BLOOM, 384, (256, 2, 128, 1),
        population_size=8, options=("--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "12"),
    ),
    Case("... as if it were data-parallel", BLOOM, 384, None, ("Set train_batch_size to 1536 or 2304",),
        population_size=8),
    Case(
        "bigscience-workshop/bigscience jz/configs/deepspeed/ds_zero3.json",
        {
            "fp16": scaled(), **ADAMW, **DECAY, **PRINTS, **batch(),
            "zero_optimization": {
                **STAGE_3, **OFFLOADED, "sub_group_size": 1e14, "stage3_gather_fp16_weights_on_model_save": True
            },
        },
        8, None, NO_BATCH, FILLED,
    ),
    Case(
        "axolotl-ai-cloud/axolotl deepspeed_configs/zero1.json",
        {**AXOLOTL, **ADAMW, **batch(), "zero_optimization": {"stage": 1, "overlap_comm": True}}, 8, None, NO_BATCH,
        FILLED,
    ),
    Case(
        "axolotl-ai-cloud/axolotl deepspeed_configs/zero2.json, with numbers",
        {**AXOLOTL, **batch(32, 2, 1), "gradient_clipping": AUTO, "zero_optimization": {**STAGE_2,
        "offload_optimizer": {"device": "cpu"}}},
        16, (8, 2, 1, 4), warnings=FILLED,
    ),
    Case(
        "axolotl-ai-cloud/axolotl deepspeed_configs/zero3_bf16_cpuoffload_all.json, with numbers",
        {
            "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True, "bf16": {"enabled": True},
            **batch(None, 1, 4), "gradient_clipping": 1.0,
            "zero_optimization": {
                **OFFLOADED, "stage": 3, "sub_group_size": 0, "max_live_parameters": 0, "max_reuse_distance": 0,
                "gather_16bit_weights_on_model_save": True, "reduce_bucket_size": AUTO,
            },
        },
        16, (16, 1, 4, 4),
    ),
    Case(
        "axolotl-ai-cloud/axolotl deepspeed_configs/zero1_torch_compile.json",
        {
            **AXOLOTL, **batch(), "zero_optimization": {"stage": 1, "overlap_comm": True},
            "compile": {"disable": False, "backend": "inductor"}, "gradient_clipping": AUTO,
        },
        8, None, (*NO_BATCH, "compile.disable is no key", "compile.backend is no key"), FILLED,
    ),
    Case(
        "hiyouga/LLaMA-Factory examples/deepspeed/ds_z0_config.json",
        {**FACTORY, **batch(), "zero_optimization": {"stage": 0, **FACTORY_ZERO},
        "monitor_config": {"enabled": True}},
        8, None, NO_BATCH, FILLED,
    ),
    Case(
        "hiyouga/LLaMA-Factory examples/deepspeed/ds_z2_autotp_config.json, with numbers",
        {
            "_comment": "supported models", **FACTORY, **batch(64, 2, None),
            "zero_optimization": {"stage": 2, **FACTORY_ZERO}, "tensor_parallel": {"autotp_size": 2},
        },
        16, (8, 2, 2, 2), warnings=FILLED,
    ),
    Case(
        "hiyouga/LLaMA-Factory examples/deepspeed/ds_z3_fp8_config.json",
        {
            **batch(None, AUTO, None), "gradient_clipping": 0.001, "fp16": scaled(False), "bf16": {"enabled": False},
            "fp8": {"enabled": True}, "zero_optimization": {**STAGE_3, **FROM_MEMORY}, "steps_per_print": 10000000,
        },
        8, None, ('train_micro_batch_size_per_gpu is "auto"',),
    ),
    Case(
        "hiyouga/LLaMA-Factory examples/deepspeed/ds_z3_alst_config.json",
        {**ALST, **batch(None)}, 8, None,
        (
            'train_micro_batch_size_per_gpu and gradient_accumulation_steps are "auto"', "bf16.auto_cast is no key",
            "bf16.loss_scale is no key", "bf16.initial_scale_power is no key", "bf16.loss_scale_window is no key",
            "bf16.hysteresis is no key", "bf16.min_loss_scale is no key",
        ),
        (*FILLED, "'sequence_parallel' is no key that DeepSpeed reads"),
    ),
    Case(
        "huggingface/accelerate examples/deepspeed_config_templates/zero_stage3_offload_config.json, with numbers",
        {
            "fp16": scaled(), **optimizer("AdamW", lr=AUTO, weight_decay=AUTO), **DECAY, **PRINTS, **batch(64, 8, 1),
            "zero_optimization": {**STAGE_3, **OFFLOADED, "stage3_gather_16bit_weights_on_model_save": AUTO},
        },
        8, (16, 8, 1, 2), warnings=FILLED,
    ),
    Case(
        "huggingface/accelerate tests/deepspeed/ds_config_zero2_model_only.json",
        {**BOTH_AUTO, **PRINTS, **batch(AUTO, AUTO, 1), "zero_optimization": {**STAGE_2, "reduce_bucket_size": AUTO}},
        8, None, ('train_batch_size and train_micro_batch_size_per_gpu are "auto"',), FILLED,
    ),
    Case(
        "microsoft/DeepSpeedExamples bing_bert/deepspeed_bsz64k_lamb_config_seq128.json",
        {
            **BING, **batch(65536, 64, None), **optimizer("Lamb", lr=11e-3, **LAMB),
            "fp16": {"enabled": True, "loss_scale": 0}, "sparse_attention": {"mode": "fixed", "block": 16},
        },
        64, (16384, 64, 16, 16), ("'sparse_attention' was removed", NO_SCALE),
    ),
    Case(
        "microsoft/DeepSpeedExamples bing_bert/deepspeed_bsz4096_adam_config.json",
        {
            **batch(4096, 64, None), **optimizer("Adam", max_grad_norm=1.0, **BING_ADAM), "steps_per_print": 1000,
            "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
        },
        16, (1024, 64, 4, 4), ("optimizer.params.max_grad_norm is set", NO_SCALE),
    ),
    Case(
        "microsoft/DeepSpeedExamples bing_bert/deepspeed_bsz4k_progressive_layer_drop_config_seq128.json",
        {
            **BING, **batch(4096, 16, None), **optimizer("Adam", **BING_ADAM), "prescale_gradients": True,
            "gradient_predivide_factor": 8, "fp16": {"enabled": True, "loss_scale": 0},
        },
        64, (1024, 16, 4, 16), (NO_SCALE,),
    ),
    Case(
        "microsoft/DeepSpeedExamples bing_bert/1-bit_adam/nccl/deepspeed_bsz4k_onebitadam_config_seq128_nccl.json",
        {
            **BING, **batch(4096, 16, None), "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
            **optimizer("OneBitAdam", **BING_ADAM, freeze_step=23000, cuda_aware=False, comm_backend_name="nccl"),
        },
        64, (1024, 16, 4, 16), ('Set it to \'AdamW\'', NO_SCALE),
    ),
    Case(
        "microsoft/DeepSpeedExamples bing_bert/01_adam/mpi_infiniband/deepspeed_bsz4k_01adam_...json",
        {
            **BING, **batch(4096, 16, None), "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
            **optimizer("ZeroOneAdam", **BING_ADAM, var_freeze_step=12500, local_step_scaler=32678),
        },
        64, (1024, 16, 4, 16), ("ZeroOneAdam", NO_SCALE),
    ),
    Case(
        "microsoft/DeepSpeedExamples BingBertSquad/deepspeed_bsz24_config.json",
        {
            **batch(24, 6, None), "steps_per_print": 10, "fp16": {"enabled": True},
            **optimizer("Adam", lr=3e-5, max_grad_norm=1.0, weight_decay=0.0, bias_correction=False),
        },
        4, (6, 6, 1, 1), ("optimizer.params.max_grad_norm is set", NO_SCALE),
    ),
    Case(
        "microsoft/DeepSpeedExamples cifar/ds_config_lamb.json",
        {**BING, **batch(1024, 16, None), **optimizer("Lamb", lr=5e-3, **LAMB), "fp16": {"enabled": False,
        "loss_scale": 0}},
        8, (256, 16, 8, 2),
    ),
    Case(
        "microsoft/DeepSpeedExamples QANet-Pytorch/ds_bsz512_1cycle.json",
        {
            **batch(512, 32, None), **optimizer("Adam", lr=0.001, betas=[0.8, 0.999], eps=1e-8, weight_decay=3e-7),
            **scheduler(
                "OneCycle", cycle_min_lr=0.004, cycle_max_lr=0.015, cycle_first_step_size=1000,
                cycle_second_step_size=100, cycle_first_stair_count=100, decay_step_size=1000, decay_lr_rate=0.01,
            ),
        },
        8, (128, 32, 2, 2),
    ),
    Case(
        "microsoft/DeepSpeedExamples Megatron-LM-v1.1.5-ZeRO3/examples/ds_zero_stage_infinity_config.json",
        {**batch(None, 4, 1), "zero_optimization": INFINITY, "gradient_clipping": 1.0, "fp16": scaled(power=None,
        loss_scale=1024)},
        16, (16, 4, 1, 4), ("Did you mean 'stage3_param_persistence_threshold'", "offload_param.device is nvme"),
    ),
    Case(
        "microsoft/DeepSpeedExamples autotuning/hf/dsconfigs/ds_config_fp16_z0.json",
        {**batch(None, AUTO, None), "zero_optimization": {"stage": 0}, "fp16": {"enabled": True}}, 8, None,
        ('train_micro_batch_size_per_gpu is "auto"', NO_SCALE),
    ),
    Case(
        "microsoft/DeepSpeedExamples compression/bert/config/XTC/ds_config_layer_reduction_fp16.json",
        {
            **batch(32, 32, None), "zero_optimization": {"stage": 0}, "fp16": {"enabled": False},
            "gradient_clipping": 1.0, "prescale_gradients": True, "compression_training": {"layer_reduction": {}},
        },
        4, None, ("'compression_training' was removed", "leaves a rest of 32. Set train_batch_size to 128"),
    ),
    Case(
        "microsoft/DeepSpeedExamples Megatron-LM/scripts/ds_zero2_config.json",
        {
            **batch(16, None, 1), "zero_optimization": {"stage": 2}, **optimizer("Adam", lr=0.00015),
            "gradient_clipping": 1.0, "fp16": scaled(power=None),
            "activation_checkpointing": {"partition_activations": True},
        },
        8, (4, 2, 1, 2),
    ),
    Case(
        "microsoft/DeepSpeedExamples MoQ/test.json",
        {"gradient_clipping": 1.0, "fp16": {"initial_scale_power": 16, "enabled": True},
        "quantize_training": {"enabled": True}},
        8, None, ("'quantize_training' was removed", "neither train_batch_size nor", NO_SCALE),
    ),
    Case("databrickslabs/dolly config/v100_config.json", {**DOLLY, **batch()}, 8, None, NO_BATCH, FILLED),
    Case("... with numbers", {**DOLLY, **batch(None, 3, 1)}, 8, (6, 3, 1, 2), warnings=FILLED),
    Case(
        "lm-sys/FastChat playground/deepspeed_config_s3.json",
        {
            "fp16": scaled(AUTO), **batch(),
            "zero_optimization": {
                **STAGE_3, **OFFLOADED, **FROM_MEMORY, "stage3_prefetch_bucket_size": 5e8,
                "stage3_param_persistence_threshold": 1e6, "sub_group_size": 1e12,
            },
        },
        8, None, NO_BATCH,
    ),
    Case(
        "lm-sys/FastChat playground/deepspeed_config_lora_s2.json, with numbers",
        {**LORA_2, **batch(128, 2, None)}, 8, (32, 2, 8, 2), warnings=FILLED,
    ),
    Case("haotian-liu/LLaVA scripts/zero3_offload.json", {**LLAVA, **batch()}, 8, None, NO_BATCH, FILLED),
    Case("... with numbers", {**LLAVA, **batch(128, 16, 1)}, 8, (32, 16, 1, 2), warnings=FILLED),
    Case(
        "QwenLM/Qwen finetune/ds_config_zero2.json",
        {**BOTH_AUTO, **ADAMW, **WARMUP, **PRINTS, **batch(), "zero_optimization": {**STAGE_2,
        "offload_optimizer": {"device": "none", "pin_memory": True}}},
        8, None, NO_BATCH, FILLED,
    ),
)  # fmt: skip
