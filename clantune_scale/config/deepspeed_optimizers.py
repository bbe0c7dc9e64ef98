"""The ``optimizer`` and ``scheduler`` blocks of a DeepSpeed config, checked against what DeepSpeed 0.19 can make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from clantune_scale.config.deepspeed_schema import FLAGS, NUMBERS
from clantune_scale.config.deepspeed_values import AUTO, block_of, is_number, shown
from clantune_scale.core.spelling import did_you_mean

#: Optimizers that DeepSpeed makes itself, in any spelling of their case.
OWN_OPTIMIZERS = ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", "MuAdam", "MuAdamW", "MuSGD")
#: Those that it takes from ``torch.optim``, by their exact names, in the versions of torch that this package supports.
TORCH_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam", "RMSprop",
    "Rprop", "SGD", "SparseAdam",
)  # fmt: skip
# What DeepSpeed had before 0.19, and what is nearest to it.
_REMOVED = {"onebitadam": "AdamW", "zerooneadam": "AdamW", "onebitlamb": "Lamb"}
_SHARDED = ("adam", "adamw", "adagrad", "lion", "muon")

OWN_SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
TORCH_SCHEDULERS = (
    "ChainedScheduler", "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR",
    "LambdaLR", "LinearLR", "MultiStepLR", "MultiplicativeLR", "OneCycleLR", "PolynomialLR", "ReduceLROnPlateau",
    "SequentialLR", "StepLR",
)  # fmt: skip
#: Parameters without a default, and all that have a number, of DeepSpeed's own schedulers.
REQUIRED = {
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
    "WarmupDecayLR": ("total_num_steps",),
    "WarmupCosineLR": ("total_num_steps",),
}
_OF_SCHEDULERS = (
    "total_num_steps", "warmup_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_min_ratio", "cos_min_ratio",
    "cycle_min_lr", "cycle_max_lr", "cycle_first_step_size", "cycle_second_step_size", "decay_lr_rate",
)  # fmt: skip
_MAY_BE_LISTS = ("warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr")
_MAY_BE_NULL = ("warmup_max_lr", "cycle_second_step_size")

_OF_OPTIMIZERS = ("lr", "eps", "weight_decay", "momentum")
_KNOWN = (*_OF_OPTIMIZERS, "betas", "bias_correction", "adam_w_mode", "torch_adam", "amsgrad", "max_coeff", "min_coeff")


def optimizer_refusals(ds_config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for everything in the ``optimizer`` block of which DeepSpeed cannot make an optimizer."""
    if "optimizer" not in ds_config:
        return
    block = ds_config["optimizer"]
    if not isinstance(block, Mapping):
        yield _no_object("optimizer", block, '{"type": "AdamW", "params": {"lr": 1e-3}}')
        return
    kind = block.get("type")
    if kind is not None:
        yield from _type_refusals(kind, ds_config)
    params = block.get("params")
    if params is not None and not isinstance(params, Mapping):
        yield _no_object("optimizer.params", params, '{"lr": 1e-3}')
        return
    for key, value in (params or {}).items():
        yield from _parameter_refusals(str(key), value)


def scheduler_refusals(ds_config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for everything in the ``scheduler`` block of which DeepSpeed cannot make a scheduler."""
    if "scheduler" not in ds_config:
        return
    block = ds_config["scheduler"]
    if not isinstance(block, Mapping):
        yield _no_object("scheduler", block, '{"type": "WarmupLR", "params": {}}')
        return
    kind = block.get("type")
    if kind is None:
        return
    if kind not in (*OWN_SCHEDULERS, *TORCH_SCHEDULERS):
        yield _unknown("scheduler.type", kind, OWN_SCHEDULERS, TORCH_SCHEDULERS)
    params = block.get("params")
    if not isinstance(params, Mapping):
        found = "missing" if "params" not in block else shown(params)
        yield f"scheduler.params is {found}, and DeepSpeed passes it to the scheduler. Write an object, {{}} at least."
        return
    for key in REQUIRED.get(kind, ()) if isinstance(kind, str) else ():
        if key not in params:
            yield f"scheduler.params.{key} is missing, and {kind} has no default for it. Add it."
    for key, value in params.items():
        if key not in _OF_SCHEDULERS or value == AUTO or (value is None and key in _MAY_BE_NULL):
            continue
        values = value if isinstance(value, list) and value and key in _MAY_BE_LISTS else [value]
        if not all(_is_at_least_0(one) for one in values):
            yield f"scheduler.params.{key} is {shown(value)}. Write a number of at least 0, without quotes."


def filled_by_others(ds_config: Mapping[str, Any]) -> list[str]:
    """The paths that are "auto" where DeepSpeed does not take its default for it, except those of the batch."""
    paths = [key for key in (*NUMBERS, *FLAGS) if ds_config.get(key) == AUTO]
    for name in ("optimizer", "scheduler"):
        params = block_of(block_of(ds_config, name), "params")
        paths += [f"{name}.params.{key}" for key, value in params.items() if value == AUTO]
    return paths


def _type_refusals(kind: Any, ds_config: Mapping[str, Any]) -> Iterator[str]:
    name = kind.lower() if isinstance(kind, str) else ""
    is_own = name in map(str.lower, OWN_OPTIMIZERS)
    if name in _REMOVED:
        yield f"optimizer.type is {shown(kind)}, which DeepSpeed 0.19 no longer has. Set it to {_REMOVED[name]!r}."
    elif not is_own and kind not in TORCH_OPTIMIZERS:
        yield _unknown("optimizer.type", kind, OWN_OPTIMIZERS, TORCH_OPTIMIZERS)
    elif _shards(ds_config) and name not in _SHARDED and not ds_config.get("zero_allow_untested_optimizer", False):
        yield (
            f"optimizer.type is {shown(kind)}, which DeepSpeed runs under ZeRO only if it is told to. Set "
            f"zero_allow_untested_optimizer to true, or zero_optimization.stage to 0."
        )
    scale = block_of(ds_config, "fp16").get("loss_scale", 0)
    if name == "lamb" and is_number(scale) and scale != 0:
        yield f"fp16.loss_scale is {scale}, and DeepSpeed's Lamb needs a dynamic one. Set it to 0."


def _parameter_refusals(key: str, value: Any) -> Iterator[str]:
    where = f"optimizer.params.{key}"
    if key == "max_grad_norm":
        yield f"{where} is set, and DeepSpeed raises on it. Delete it, and set gradient_clipping instead."
    elif value == AUTO:
        return
    elif key == "betas":
        if not (isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_share, value))):
            yield f"{where} is {shown(value)}. Write two numbers from 0 to below 1, such as [0.9, 0.999]."
    elif key in _OF_OPTIMIZERS:
        if not _is_at_least_0(value):
            yield f"{where} is {shown(value)}. Write a number of at least 0, without quotes."
    elif key not in _KNOWN and (meant := did_you_mean(key, _KNOWN, cutoff=0.8)):
        yield f"{where} is no parameter of an optimizer.{meant}"


def _shards(ds_config: Mapping[str, Any]) -> bool:
    zero = ds_config.get("zero_optimization")
    return zero is True or block_of(ds_config, "zero_optimization").get("stage", 0) in (1, 2, 3)


def _is_at_least_0(value: Any) -> bool:
    return is_number(value) and math.isfinite(value) and value >= 0


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def _no_object(where: str, value: Any, example: str) -> str:
    return f"{where} is {shown(value)}, not an object. Write one, such as {example}, or delete the key."


def _unknown(where: str, kind: Any, own: Iterable[str], of_torch: Iterable[str]) -> str:
    names = list(dict.fromkeys((*own, *of_torch)))
    meant = did_you_mean(kind, names) if isinstance(kind, str) else ""
    remedy = meant or f" Choose from: {', '.join(names)}."
    return f"{where} is {shown(kind)}, which is none of DeepSpeed's and torch's.{remedy}"
