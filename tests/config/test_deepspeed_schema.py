"""Keys and types of a DeepSpeed config, against the installed version's own models, value by value."""

from __future__ import annotations

import pytest
import torch

from clantune_scale.config import deepspeed_optimizers, deepspeed_schema
from clantune_scale.config.deepspeed_limits import config_refusals, dtype_of, zero_stage
from clantune_scale.config.deepspeed_schema import CHECKED_BLOCKS, FLAGS, NUMBERS, OTHERS, ignored_keys

# Of every kind that a JSON file can hold.
_VALUES = (True, False, None, -1, 0, 1, 1.5, 1e9, "1", "true", "cpu", "text", "auto", [], ["z1"], {}, 0.5)


def _models():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime import precision_config as precision
    from deepspeed.runtime.zero import offload_config as offload
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "fp16": precision.DeepSpeedFP16Config,
        "bf16": precision.DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "compile": CompileConfig,
        "comms_logger": CommsLoggerConfig,
    }


@pytest.mark.parametrize("path", CHECKED_BLOCKS)
def test_a_block_has_deepspeeds_keys_and_takes_the_values_that_deepspeed_takes(path):
    model = _models()[path]
    names = set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
    assert set(deepspeed_schema._model_of(path).model_fields) == names
    # A sentence and blocks of their own; a rule between two keys.
    for key in sorted(names - {"stage", "offload_param", "offload_optimizer", "zenflow", "leaf_module"}):
        for value in _VALUES:
            if (key, value) in (("compute_grad_norm", False), ("ratio", 0), ("ratio", 0.5)):
                continue
            try:
                model(**{key: value})
                is_taken = True
            except ValueError:
                is_taken = False
            said = list(deepspeed_schema._block_refusals(path, {key: value}))
            assert (said == []) is is_taken, (key, value, said)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage3_param_persitance_threshold": 1}}, "Did you mean 'stage3_param_persistence_thr"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "Did you mean 'overlap_comm'"),
        ({"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 1}}, "two names of one key"),
        ({"zero_optimization": {"offload_param": "cpu"}}, 'offload_param is "cpu", not an object'),
        ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, 'offload_param.device is "gpu"'),
        ({"zero_optimization": None}, "zero_optimization is null, not an object"),
        ({"fp16": True}, "fp16 is true, not an object"),
        ({"bf16": {"enabled": None}}, "bf16.enabled is null, and should be a valid boolean"),
        ({"fp16": {"enabled": True, "min_loss_scale": 0}, "zero_optimization": {"stage": 1}}, "min_loss_scale is 0"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "the stage is 0. DeepSpeed takes that only for 1 and 2"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"ratio": 0.5}}}, "ratio is below 1"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "which needs ZeRO"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_master_weights_and_grads to true too"),
        ({"gradient_clipping": "1.0"}, 'gradient_clipping is "1.0". Write a number'),
        ({"gradient_clipping": None}, "gradient_clipping is null"),
        ({"gradient_clipping": 10**400}, "gradient_clipping is 1000000000"),
        ({"steps_per_print": []}, "steps_per_print is []"),
        ({"wall_clock_breakdown": "false"}, "Write true or false, without quotes"),
        ({"optimizer": None}, "optimizer is null, not an object"),
        ({"optimizer": {"type": "OneBitAdam"}}, "DeepSpeed 0.19 no longer has. Set it to 'AdamW'"),
        ({"optimizer": {"type": "AdmaW"}}, "Did you mean 'AdamW'"),
        ({"optimizer": {"type": "sgd"}}, "Did you mean 'SGD'"),
        ({"optimizer": {"type": "Sophia"}}, "Choose from: Adam, AdamW"),
        ({"optimizer": {"type": 3}}, "optimizer.type is 3"),
        ({"optimizer": {"type": "Adam", "params": []}}, "optimizer.params is [], not an object"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "1e-3"}}}, 'optimizer.params.lr is "1e-3"'),
        ({"optimizer": {"type": "Adam", "params": {"lr": None}}}, "optimizer.params.lr is null"),
        ({"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}, "betas is 0.9. Write two numbers"),
        ({"optimizer": {"type": "Adam", "params": {"wieght_decay": 0.1}}}, "Did you mean 'weight_decay'"),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}}, "set gradient_clipping instead"),
        ({"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 1}}, "zero_allow_untested_optimizer"),
        ({"optimizer": {"type": "Lamb"}, "fp16": {"loss_scale": 128}}, "needs a dynamic one"),
        ({"scheduler": "WarmupLR"}, 'scheduler is "WarmupLR", not an object'),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.params is missing"),
        ({"scheduler": {"type": "WarmupLR", "params": None}}, "scheduler.params is null"),
        ({"scheduler": {"type": "WarmUpLR", "params": {}}}, "Did you mean 'WarmupLR'"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {}}}, "scheduler.params.total_num_steps is missing"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "10"}}}, 'warmup_num_steps is "10"'),
    ],
)
def test_each_is_refused_by_name_with_what_to_do(config, message):
    (refusal,) = config_refusals(config)
    assert message in refusal and refusal.endswith((".", "?"))


@pytest.mark.parametrize(
    "config",
    [
        {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}},
        {"zero_optimization": {"stage": "auto", "offload_param": "auto", "reduce_bucket_size": "auto"}},
        {"zero_optimization": True, "bf16": None},
        {"optimizer": {"type": "AdamW", "params": None}},
        {"optimizer": {"type": "aDaM", "params": {"lr": "auto", "betas": "auto"}}},
        {"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True},
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1e6, "warmup_max_lr": None}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": [0, 0], "warmup_max_lr": [0.1, 0.2]}}},
        {"gradient_clipping": "auto", "steps_per_print": float("inf"), "prescale_gradients": None},
    ],
)
def test_what_deepspeed_takes_is_not_refused(config):
    assert list(config_refusals(config)) == []


def test_what_is_on_is_read_as_deepspeed_reads_it():
    assert dtype_of({"bf16": {"enabled": "auto"}}) == "fp32" == dtype_of({"fp16": {"enabled": "false"}})
    assert dtype_of({"bfloat16": {"enabled": True}}) == "bf16" == dtype_of({"bf16": {"enabled": "true"}})
    assert zero_stage({"zero_optimization": True}) == 1 and zero_stage({"zero_optimization": {"stage": "auto"}}) == 0


def test_a_key_that_deepspeed_would_ignore_is_named_and_a_key_of_ones_own_is_not():
    (said,) = ignored_keys({"gradient_cliping": 1.0, "_comment": "", "fp8": {}, "my_own": 1, "fp16": {}})
    assert "'gradient_cliping' is no key that DeepSpeed reads" in said and "'gradient_clipping'" in said


def test_the_known_top_level_keys_are_in_deepspeeds_source():
    from pathlib import Path

    import deepspeed

    root = Path(deepspeed.__file__).parent
    files = [root / "__init__.py", *root.glob("runtime/*.py"), *root.glob("*/config.py"), *root.glob("*/constants.py")]
    files += [*root.glob("runtime/*/*config*.py"), *root.glob("runtime/*/*constants*.py"), *root.glob("profiling/*.py")]
    source = "\n".join(path.read_text() for path in files)
    missing = [key for key in (*NUMBERS, *FLAGS, *OTHERS) if f'"{key}"' not in source and f"'{key}'" not in source]
    assert missing == []


def test_the_optimizers_and_schedulers_are_deepspeeds_and_torchs():
    import inspect

    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    of = deepspeed_optimizers
    assert sorted(map(str.lower, of.OWN_OPTIMIZERS)) == sorted(DEEPSPEED_OPTIMIZERS)
    classes = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    theirs = {name for name, kind in classes.items() if issubclass(kind, torch.optim.Optimizer)} - {"Optimizer"}
    # Muon came with torch 2.9.
    assert theirs <= set(of.TORCH_OPTIMIZERS) and set(of.TORCH_OPTIMIZERS) - theirs <= {"Muon"}
    assert all(hasattr(torch.optim.lr_scheduler, name) for name in of.TORCH_SCHEDULERS)
    assert set(lr_schedules.VALID_LR_SCHEDULES) == set(of.OWN_SCHEDULERS)
    for name in of.OWN_SCHEDULERS:
        parameters = inspect.signature(getattr(lr_schedules, name)).parameters.values()
        needed = tuple(one.name for one in parameters if one.default is one.empty and one.name != "optimizer")
        assert of.REQUIRED.get(name, ()) == needed
