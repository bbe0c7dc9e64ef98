"""``module:factory`` on the command line: a model that is built without memory, and what a config makes of it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clantune_scale.errors import ConfigError

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.AdamW,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
_KEYS = ("lr", "betas", "eps", "weight_decay", "momentum")


@dataclass(frozen=True)
class LoadedModel:
    """A model on the meta device: shapes and modules, no numbers.

    Attributes:
        module: the model.
        groups: its parameter groups as the factory gave them; one of all trainable parameters otherwise.
    """

    module: torch.nn.Module
    groups: Sequence[Mapping[str, Any]]

    @property
    def trainable(self) -> list[int]:
        """Elements of each trainable parameter, in the model's order."""
        return [parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def has_moe(self) -> bool:
        """Whether it has DeepSpeed's mixture-of-experts layers."""
        parts = (type(part) for part in self.module.modules())
        return any(kind.__name__ == "MoE" and kind.__module__.startswith("deepspeed") for kind in parts)


def load_model(spec: str, arguments: Mapping[str, Any] | None = None) -> LoadedModel:
    """Imports a factory and calls it on the meta device, where parameters have shapes and take no memory.

    Args:
        spec: ``module:factory`` or ``path/to/file.py:factory``; the current folder counts as on the path. The
            factory returns a module, or a module and its parameter groups (for genes with ``groups``).
        arguments: keyword arguments for the factory.

    Raises:
        ConfigError: if it cannot be imported or called, or gives no module.
    """
    factory = _import(spec)
    try:
        with torch.device("meta"):
            built = factory(**(arguments or {}))
    except Exception as error:  # the user's code: whatever it raises belongs into the sentence
        raise ConfigError(
            f"{spec} raised {type(error).__name__} on the meta device: {error}. Give a factory that needs no data, "
            f"its arguments with --model-args, or --params N in its place."
        ) from error
    module, groups = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"{spec} gave a {type(module).__name__}. Return a torch.nn.Module, or it and its groups.")
    if groups is None:
        groups = [{"params": [parameter for parameter in module.parameters() if parameter.requires_grad]}]
    return LoadedModel(module, list(groups))


class ConfigBackend:
    """What genes are bound to, without an engine: the model, and what the DeepSpeed config says of the rest.

    Args:
        model: on the meta device.
        ds_config: a DeepSpeed config.
        accumulation: micro-batches per step that follow from it.
    """

    def __init__(self, model: LoadedModel, ds_config: Mapping[str, Any], accumulation: int) -> None:
        self.module = model.module
        self.clip = float(ds_config.get("gradient_clipping", 0.0))
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
    except Exception as error:  # the user's module: whatever it raises belongs into the sentence
        raise ConfigError(
            f"--model {spec} cannot be imported: {type(error).__name__}: {error}. "
            f"Check the name, and that its folder is the current one or on PYTHONPATH."
        ) from error


def _optimizer_groups(model: LoadedModel, block: Any) -> list[dict[str, Any]]:
    """The groups with every hyperparameter; the script's own optimizer, which nobody knows, counts as AdamW."""
    block = block if isinstance(block, Mapping) else {}
    params = {key: value for key, value in block.get("params", {}).items() if key in _KEYS}
    name = str(block.get("type", "adamw")).lower()
    if name != "sgd" and not block.get("params", {}).get("torch_adam", False):
        params.setdefault("weight_decay", 0.0)  # DeepSpeed's own Adam has none by default, torch's has 0.01
    groups = [dict(group) for group in model.groups]
    optimizer = _OPTIMIZERS.get(name, torch.optim.AdamW)
    return optimizer(groups, **{"lr": 1e-3, **params}).param_groups
