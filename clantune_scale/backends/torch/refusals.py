"""What a clan in a plain loop cannot run under, seen before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from clantune_scale.errors import ConfigError


def require_known_parameters(optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
    """The optimizer updates the module's own parameters, and they are in float32.

    Raises:
        ConfigError: if it does not, or they are not.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"the optimizer is a {type(optimizer).__name__}, whose state the clan cannot find. Pass the "
            f"torch.optim.Optimizer itself that updates the parameters."
        )
    if not named:
        raise ConfigError("the model has no parameters. Pass the module that is trained.")
    names = {id(parameter): name for name, parameter in named}
    updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = [parameter for parameter in updated if id(parameter) not in names]
    if strangers:
        raise ConfigError(
            f"the optimizer updates {len(strangers)} tensors that are not parameters of the model (the first has shape "
            f"{list(strangers[0].shape)}). Make it from model.parameters() after fully_shard() or DDP, and give it "
            f"nothing else."
        )
    half = next((p for p in updated if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)), None)
    if half is not None:
        raise ConfigError(
            f"{names[id(half)]} is kept in {half.dtype}, in which averages of weights do not move. Keep the "
            f"parameters in float32 and compute in 16 bits: MixedPrecisionPolicy(param_dtype=torch.bfloat16), or "
            f"torch.autocast."
        )


def require_plain_step(args: tuple, kwargs: dict[str, Any]) -> None:
    """An update without a closure: inside one, gradients would be computed while genes are written.

    Raises:
        ConfigError: if a closure is given.
    """
    closure = args[0] if args else kwargs.get("closure")
    if closure is not None:
        raise ConfigError(
            "optimizer.step(closure) computes gradients inside the update, and the clan averages them before it. "
            "Call loss.backward() before optimizer.step(), and use an optimizer that needs no closure."
        )
