"""Update rules that look at a parameter's shape: Adafactor, and Muon for matrices with AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from clantune_scale.bench.batched.optimizers import Hyper, RowOptimizer, register, widen
from clantune_scale.bench.batched.state import RowLayout, State


class Adafactor(RowOptimizer):
    """Second moments of a matrix by its rows and columns (Shazeer and Stern 2018), as ``torch.optim.Adafactor``.

    The learning rate is relative to each parameter's own root mean square. It is never above the inverse square root
    of the number of steps, which is the original's own schedule.
    """

    slots = ("row_var", "col_var", "variance")
    defaults: ClassVar = {"beta2_decay": -0.8, "eps2": 1e-3, "threshold": 1.0}

    def slot_sizes(self, layout: RowLayout) -> dict[str, int]:
        matrices = [shape for shape in layout.shapes if len(shape) > 1]
        vectors = [size for shape, size in zip(layout.shapes, layout.sizes, strict=True) if len(shape) <= 1]
        rows = sum(shape.numel() // shape[-1] for shape in matrices)
        return {
            "row_var": rows,
            "col_var": sum(shape.numel() // shape[-2] for shape in matrices),
            "variance": sum(vectors),
        }

    @torch.no_grad()
    def update(self, state: State, gradient: torch.Tensor, hyper: Hyper, layout: RowLayout) -> None:
        lr, dtype = hyper["lr"], gradient.dtype
        widen(state, gradient, hyper["beta2_decay"])
        state.num_updates += 1
        share = (state.num_updates ** hyper["beta2_decay"]).to(dtype)
        rate = torch.minimum(lr, state.num_updates**-0.5).to(dtype)
        sizes = [size**0.5 for size in layout.sizes]
        # Before the decay, as in torch.
        scales = [
            rate * torch.maximum(part.flatten(2).norm(dim=2, keepdim=True) / root, hyper["eps2"].to(dtype))
            for part, root in zip(layout.parts(state.weights), sizes, strict=True)
        ]
        if bool(hyper["weight_decay"].any()):
            state.weights.mul_((1 - lr * hyper["weight_decay"]).to(dtype))
        directions = self._directions(state, layout.parts(gradient), share)
        limit = hyper["threshold"].to(dtype)
        for part, scale, direction, root in zip(
            state.weights.split(layout.sizes, dim=2), scales, directions, sizes, strict=True
        ):
            excess = (direction.norm(dim=2, keepdim=True) / (root * limit)).clamp(min=1.0)
            part.addcmul_(direction / excess, scale, value=-1)

    def _directions(self, state: State, gradients: Sequence[torch.Tensor], share: torch.Tensor) -> list[torch.Tensor]:
        """[clans, members or 1, size] for each parameter: its gradient over the estimate of its root mean square."""
        places, directions = dict.fromkeys(self.slots, 0), []
        eps = torch.finfo(share.dtype).eps

        def average(slot: str, values: torch.Tensor) -> torch.Tensor:
            """``values`` taken into their part of the slot."""
            begin, flat = places[slot], values.flatten(2)
            places[slot] = begin + flat.shape[2]
            own = state.slots[slot][..., begin : places[slot]]
            own.lerp_(flat, share)
            return own.reshape(*own.shape[:2], *values.shape[2:])

        for gradient in gradients:
            if gradient.dim() > 3:
                rows = average("row_var", gradient.square().mean(dim=-1)).unsqueeze(-1)
                columns = average("col_var", gradient.square().mean(dim=-2)).unsqueeze(-2)
                variance = rows * columns / rows.mean(dim=-2, keepdim=True).clamp(min=eps)
            else:
                variance = average("variance", gradient.square())
            directions.append((gradient * variance.clamp(min=eps * eps).rsqrt()).flatten(2))
        return directions


class MuonAdamW(RowOptimizer):
    """Orthogonalized momentum for every matrix, AdamW for vectors, at one learning rate.

    As ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"`` (Jordan 2024; Liu et al. 2025), whose updates are as
    large as AdamW's, beside ``torch.optim.AdamW``. torch orthogonalizes in bfloat16, and this rule in the weights' own
    type.
    """

    slots = ("exp_avg", "exp_avg_sq")
    defaults: ClassVar = {"momentum": 0.95, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    #: Of the quintic Newton-Schulz iteration, and how often it is applied.
    COEFFICIENTS, STEPS, EPS = (3.4445, -4.775, 2.0315), 5, 1e-7

    @torch.no_grad()
    def update(self, state: State, gradient: torch.Tensor, hyper: Hyper, layout: RowLayout) -> None:
        lr, dtype = hyper["lr"], gradient.dtype
        widen(state, gradient, hyper["momentum"], hyper["beta1"], hyper["beta2"])
        state.num_updates += 1
        if bool(hyper["weight_decay"].any()):
            state.weights.mul_((1 - lr * hyper["weight_decay"]).to(dtype))
        for weights, own, first, second in zip(
            *map(layout.parts, (state.weights, gradient, state.slots["exp_avg"], state.slots["exp_avg_sq"])),
            strict=True,
        ):
            if own.dim() == 4:
                self._turn(weights, own, first, hyper)
            else:
                _adam(weights, own, first, second, state.num_updates, hyper)

    def _turn(self, weights: torch.Tensor, gradient: torch.Tensor, buffer: torch.Tensor, hyper: Hyper) -> None:
        dtype = gradient.dtype
        momentum, lr = hyper["momentum"].unsqueeze(-1), hyper["lr"].unsqueeze(-1)
        buffer.lerp_(gradient, (1 - momentum).to(dtype))
        direction = self._orthogonalized(torch.lerp(gradient, buffer, momentum.to(dtype)))
        scale = 0.2 * math.sqrt(max(gradient.shape[-2:]))
        weights.addcmul_(direction, (scale * lr).to(dtype), value=-1)

    def _orthogonalized(self, matrices: torch.Tensor) -> torch.Tensor:
        a, b, c = self.COEFFICIENTS
        is_tall = matrices.shape[-2] > matrices.shape[-1]
        x = matrices.mT if is_tall else matrices
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=self.EPS)
        for _ in range(self.STEPS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return x.mT if is_tall else x


def _adam(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    num_updates: torch.Tensor,
    hyper: Hyper,
) -> None:
    """Adam's step on a parameter [clans, members or 1, ...] that is no matrix."""
    told = (hyper["lr"], hyper["beta1"], hyper["beta2"], hyper["eps"], num_updates)
    lr, beta1, beta2, eps, num_updates = (t.view(*t.shape[:2], *[1] * (gradient.dim() - 2)) for t in told)
    dtype = gradient.dtype
    first.lerp_(gradient, (1 - beta1).to(dtype))
    second.mul_(beta2.to(dtype)).addcmul_(gradient * (1 - beta2).to(dtype), gradient)
    correction = (1 - beta2**num_updates).sqrt().to(dtype)
    denominator = second.sqrt().div_(correction).add_(eps.to(dtype))
    weights.addcmul_(first / denominator, (lr / (1 - beta1**num_updates)).to(dtype), value=-1)


register("adafactor", Adafactor())
register("muon", MuonAdamW())
