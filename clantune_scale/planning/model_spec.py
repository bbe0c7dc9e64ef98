"""``module:factory`` on the command line: builds the model without memory, and binds a config's genes to it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clantune_scale.config.deepspeed_values import block_of, is_number, number_of
from clantune_scale.errors import ConfigError

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.AdamW,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
_NUMBERS = ("lr", "eps", "weight_decay", "momentum")


@dataclass(frozen=True)
class LoadedModel:
    """A model on the meta device: it has modules and shapes, and no numbers.

    Attributes:
        module: the model.
        groups: the factory's parameter groups; if it gave none, one group of all trainable parameters.
    """

    module: torch.nn.Module
    groups: Sequence[Mapping[str, Any]]

    @property
    def trainable(self) -> list[int]:
        """Elements of each trainable parameter, in the model's order."""
        return [parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def has_moe(self) -> bool:
        """Whether the model has DeepSpeed's mixture-of-experts layers."""
        parts = (type(part) for part in self.module.modules())
        return any(kind.__name__ == "MoE" and kind.__module__.startswith("deepspeed") for kind in parts)


def load_model(spec: str, arguments: Mapping[str, Any] | None = None) -> LoadedModel:
    """Imports a factory and calls it on the meta device. Parameters there have shapes and take no memory.

    Args:
        spec: ``module:factory`` or ``path/to/file.py:factory``. The current folder is searched too. The factory
            returns a module, or a module and its parameter groups (for genes with ``groups``).
        arguments: keyword arguments for the factory.

    Raises:
        ConfigError: if the factory cannot be imported or called, or returns no module.
    """
    factory = _import(spec)
    try:
        with torch.device("meta"):
            built = factory(**(arguments or {}))
    except Exception as error:  # The user's code may raise anything, and the message quotes it.
        raise ConfigError(
            f"{spec} raised {type(error).__name__} on the meta device: {error}. Give a factory that needs no data, "
            f"give its arguments with --model-args, or give --params N instead of a model."
        ) from error
    module, groups = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"{spec} gave a {type(module).__name__}. Return a torch.nn.Module, or it and its groups.")
    if groups is None:
        groups = [{"params": [parameter for parameter in module.parameters() if parameter.requires_grad]}]
    return LoadedModel(module, list(groups))


class ConfigBackend:
    """Stands for an engine when genes are bound: the model, and the settings of a DeepSpeed config.

    Args:
        model: on the meta device.
        ds_config: a DeepSpeed config.
        accumulation: micro-batches per step by that config.
    """

    def __init__(self, model: LoadedModel, ds_config: Mapping[str, Any], accumulation: int) -> None:
        self.module = model.module
        self.clip = float(number_of(ds_config, "gradient_clipping", 0.0))
        self.accumulation = accumulation
        self._groups = _optimizer_groups(model, ds_config.get("optimizer"))

    def param_groups(self) -> list[dict[str, Any]]:
        """The groups as the optimizer of the config would hold them."""
        return self._groups


def _import(spec: str) -> Callable[..., Any]:
    module_name, colon, factory_name = spec.rpartition(":")
    if not colon or not module_name:
        raise ConfigError(f"--model is {spec!r}. Write module:factory or path/to/file.py:factory.")
    try:
        if module_name.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            assert found is not None and found.loader is not None, "a .py file has a loader"
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            if os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())
            module = importlib.import_module(module_name)
        return getattr(module, factory_name)
    except Exception as error:  # The user's module may raise anything, and the message quotes it.
        raise ConfigError(
            f"--model {spec} cannot be imported: {type(error).__name__}: {error}. "
            f"Check the name, and that its folder is the current one or on PYTHONPATH."
        ) from error


def _optimizer_groups(model: LoadedModel, block: Any) -> list[dict[str, Any]]:
    """The groups with every hyperparameter. An optimizer that the script makes is not known, and counts as AdamW."""
    block = block if isinstance(block, Mapping) else {}
    given = block_of(block, "params")
    # What is "auto" or no number has torch's default here; preflight says so.
    params = {"lr": 1e-3, **{key: given[key] for key in _NUMBERS if is_number(given.get(key))}}
    betas = given.get("betas")
    if isinstance(betas, list | tuple) and len(betas) == 2 and all(map(is_number, betas)):
        params["betas"] = tuple(betas)
    name = str(block.get("type", "adamw")).lower()
    if name != "sgd" and not given.get("torch_adam", False):
        params.setdefault("weight_decay", 0.0)  # DeepSpeed's Adam has none by default, and torch's has 0.01.
    groups = [dict(group) for group in model.groups]
    optimizer = _OPTIMIZERS.get(name, torch.optim.AdamW)
    taken = inspect.signature(optimizer).parameters
    return optimizer(groups, **{key: params[key] for key in params if key in taken}).param_groups
