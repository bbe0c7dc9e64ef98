"""Settings of a plain loop that a clan cannot run with, checked before the first step or update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from clantune_scale.errors import ClanError, ConfigError


def require_known_parameters(
    param_groups: Sequence[dict[str, Any]], named: Sequence[tuple[str, torch.nn.Parameter]], *, takes_half: bool
) -> None:
    """Checks that the optimizers update the module's own parameters, each once, in a precision that a clan can use.

    Args:
        param_groups: of the user's optimizers.
        named: the module's parameters, by name.
        takes_half: whether they may be in 16 bits.

    Raises:
        ConfigError: if one of these is not so.
    """
    if not named:
        raise ConfigError("the model has no parameters. Pass the module that you train.")
    names = {id(parameter): name for name, parameter in named}
    updated = [parameter for group in param_groups for parameter in group["params"]]
    if not any(parameter.requires_grad for parameter in updated):
        raise ConfigError("no parameter of the optimizer trains: requires_grad is False for all. Unfreeze some first.")
    shared = next((p for p, count in Counter(map(id, updated)).items() if count > 1), None)
    if shared is not None:
        raise ConfigError(f"{names.get(shared, 'a tensor')} is in two parameter groups. Give each to one optimizer.")
    strangers = [parameter for parameter in updated if id(parameter) not in names]
    if strangers:
        raise ConfigError(
            f"the optimizer updates {len(strangers)} tensors that are not parameters of the model (the first has shape "
            f"{list(strangers[0].shape)}). Create it after fully_shard() or DDP, from model.parameters() only."
        )
    half = next((p for p in updated if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)), None)
    if half is not None and not takes_half:
        raise ConfigError(
            f"{names[id(half)]} is kept in {half.dtype}, which is too coarse for averages of weights. Keep the "
            f"parameters in float32, and compute in 16 bits with MixedPrecisionPolicy(param_dtype=torch.bfloat16) or "
            f'torch.autocast; or set "members" to "line", which keeps averages in float32.'
        )


def require_only_trained(
    param_groups: Sequence[dict[str, Any]], trained: Collection[int], names: Mapping[int, str], *, num_groups: int
) -> None:
    """Checks, before an update, that it changes no parameter that stood still when the clan was attached.

    Averages, points and snapshots would leave it out.

    Args:
        param_groups: of the optimizer that is about to step.
        trained: ids of the parameters that trained then.
        names: of the module's parameters, by id.
        num_groups: parameter groups that the optimizer had then.

    Raises:
        ConfigError: if it changes another one, or there are more groups or fewer.
    """
    updated = [parameter for group in param_groups for parameter in group["params"] if parameter.grad is not None]
    new = [parameter for parameter in updated if id(parameter) not in trained]
    if new:
        first = names.get(id(new[0]), f"a tensor of shape {list(new[0].shape)}")
        more = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
        raise ConfigError(
            f"{first}{more} has a gradient, and was frozen or not in the optimizer when the clan was attached: "
            f"averages, points and snapshots would leave it out. Before attach(), give the optimizer all parameters "
            f"that will ever train and let them require gradients. Freeze some after it, and unfreeze them at any time."
        )
    if len(param_groups) != num_groups:
        raise ConfigError(
            f"the optimizer has {len(param_groups)} parameter groups and had {num_groups} when the clan was attached, "
            f"which genes, points and snapshots count. Make all groups before attach()."
        )


def require_one_gradient(parts: Sequence[torch.optim.Optimizer]) -> None:
    """Checks that no optimizer computes gradients of its own at several places of a step.

    Args:
        parts: the loop's optimizers.

    Raises:
        ConfigError: for LBFGS, whose line search moves the weights and calls the closure again and again.
    """
    if any(isinstance(part, torch.optim.LBFGS) for part in parts):
        raise ConfigError(
            "LBFGS calls its closure several times in a step, at weights of its own choice, and the clan measures and "
            "tunes steps with one gradient each. Use an optimizer that takes one gradient a step."
        )


def evaluate_closure(
    part: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Calls the closure of an ``optimizer.step(closure)`` ahead of the update, so that gradients exist before it.

    Args:
        part: the optimizer.
        args, kwargs: of its ``step``, with the optimizer first.

    Returns:
        Arguments with a closure that hands on the loss; None if there was no closure.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None
    with torch.enable_grad():
        loss = closure()
    weights = [parameter for group in part.param_groups for parameter in group["params"]]
    versions = [weight._version for weight in weights]

    def known_loss() -> Any:
        if versions != [weight._version for weight in weights]:
            raise ClanError(
                f"{type(part).__name__} calls its closure again after it has moved the weights, and the clan measures "
                f"and tunes steps with one gradient each. Use an optimizer that takes one gradient a step."
            )
        return loss

    if len(args) > 1:
        return (args[0], known_loss, *args[2:]), kwargs
    return args, {**kwargs, "closure": known_loss}
