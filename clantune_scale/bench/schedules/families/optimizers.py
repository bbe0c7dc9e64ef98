"""The families of optimizers that come with the benchmark.

Each setting of AdamW's betas is a family of its own, so that the split leaves some to either side.
"""

from __future__ import annotations

from clantune_scale.bench.schedules.families.registry import OptimizerFamily, register

_ADAM, _SGD = (-5.0, 0.5), (-4.0, 2.0)
_DECOUPLED, _COUPLED = (0.01, 0.05, 0.1), (0.0, 1e-4, 1e-3)


def _adamw(beta1: float, beta2: float) -> OptimizerFamily:
    return OptimizerFamily(
        f"adamw {beta1:g} {beta2:g}",
        "adamw",
        _ADAM,
        hyper={"beta1": beta1, "beta2": beta2},
        weight_decays=_DECOUPLED,
        momentum="beta1",
    )


for _family in (
    _adamw(0.9, 0.999),
    _adamw(0.9, 0.95),
    _adamw(0.95, 0.99),
    _adamw(0.8, 0.99),
    OptimizerFamily("adam without decay", "adamw", _ADAM, momentum="beta1"),
    OptimizerFamily("sgd 0.9", "sgd", _SGD, weight_decays=_COUPLED, momentum="momentum"),
    OptimizerFamily("sgd without momentum", "sgd", (-3.0, 2.5), hyper={"momentum": 0.0}, weight_decays=_COUPLED),
    OptimizerFamily("nesterov", "nesterov", _SGD, weight_decays=_COUPLED, momentum="momentum"),
    OptimizerFamily("lion", "lion", (-6.0, -0.5), weight_decays=(0.01, 0.1, 0.3), momentum="beta1"),
    OptimizerFamily("rmsprop", "rmsprop", _ADAM),
    OptimizerFamily("rmsprop with momentum", "rmsprop", (-6.0, -0.5), hyper={"momentum": 0.9}, momentum="momentum"),
    OptimizerFamily("adafactor", "adafactor", (-4.0, 0.0)),
    OptimizerFamily("muon", "muon", (-5.0, 0.5), weight_decays=_DECOUPLED, momentum="momentum"),
):
    register(_family)
