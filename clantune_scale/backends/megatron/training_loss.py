"""The loss of each training step, read just before backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.gradients.hooks import replace_method


class TrainingLoss:
    """Sums the micro-batches' losses on the last stage and broadcasts their mean to all stages, once per step.

    Megatron passes each loss to ``config.grad_scale_func`` before its backward pass, divided by the number of
    micro-batches (or as a sum over tokens, with ``calculate_per_token_loss``). It calls
    ``config.finalize_model_grads_func`` after the last of them.

    Args:
        config: the model's ``TransformerConfig``.
        pp_group: this rank's pipeline.
        device: of the model.
        on_loss: is called with the mean.
    """

    def __init__(
        self, config: Any, pp_group: Any, device: torch.device, on_loss: Callable[[torch.Tensor], None]
    ) -> None:
        self._config, self._pp_group, self._device, self._on_loss = config, pp_group, device, on_loss
        self._losses: list[torch.Tensor] = []

    def hook(self) -> list[Callable[[], None]]:
        """Hooks the two functions.

        Returns:
            Functions that remove the hooks.
        """
        scale, finalize = self._config.grad_scale_func, self._config.finalize_model_grads_func

        def grad_scale(loss: torch.Tensor) -> torch.Tensor:
            # Megatron also calls this with a constant 1 to learn the scale.
            if loss.requires_grad:
                self._losses.append(loss.detach().float().reshape(()))
            return loss if scale is None else scale(loss)

        def finalize_model_grads(model: Any, num_tokens: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            # Called first, because Megatron sums the tokens over the member in place.
            self._broadcast_mean(num_tokens)
            return finalize(model, num_tokens, *args, **kwargs)

        return [
            replace_method(self._config, "grad_scale_func", grad_scale),
            replace_method(self._config, "finalize_model_grads_func", finalize_model_grads),
        ]

    @torch.no_grad()
    def _broadcast_mean(self, num_tokens: torch.Tensor | None) -> None:
        mean = torch.full((), float("nan"), device=self._device)
        if self._losses:
            mean = torch.stack(self._losses).sum()
            if num_tokens is not None:
                mean = mean / num_tokens.clamp(min=1)
            self._losses.clear()
        if self._pp_group.size() > 1:
            source = dist.get_global_rank(self._pp_group, self._pp_group.size() - 1)
            dist.broadcast(mean, src=source, group=self._pp_group)
        self._on_loss(mean)
