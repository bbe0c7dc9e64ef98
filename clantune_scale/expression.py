"""From genome to effect: what each gene sets, written last before it counts, read back, and put back after.

Optimizer genes are written into the optimizer's groups around its own update only. A scheduler that
multiplies the last value (``ExponentialLR``) would otherwise take the gene in again at every step. Clip
threshold, accumulation, dropout and the user's setters belong to nobody's schedule: they are set between
steps and stay.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from clantune_scale.backends.base import Backend
from clantune_scale.config import GeneConfig
from clantune_scale.core.genome import Gene
from clantune_scale.errors import ClanError, NoEffectWarning
from clantune_scale.genes import build_gene, target_of

Setter = Callable[[float], None]

# target -> (key in a parameter group, place in its tuple or None)
_GROUP_KEYS: dict[str, tuple[str, int | None]] = {
    "lr": ("lr", None),
    "weight_decay": ("weight_decay", None),
    "beta1": ("betas", 0),
    "beta2": ("betas", 1),
    "eps": ("eps", None),
    "momentum": ("momentum", None),
}


def bind_genes(
    configs: Mapping[str, GeneConfig], backend: Backend, setters: Mapping[str, Setter]
) -> tuple[Gene, ...]:
    """The genes of a config, each with its start read from the engine where it has no other.

    A gene that sets nothing in this engine is left out, with a :class:`NoEffectWarning` by name.

    Raises:
        ConfigError: if a gene cannot be built (see :func:`clantune_scale.genes.build_gene`).
    """
    genes = []
    for name, config in configs.items():
        target = target_of(name, config)
        reason = _why_without_effect(target, config, backend, setters)
        if reason:
            warnings.warn(f"gene {name!r} has no effect: {reason}. It is left out.", NoEffectWarning, stacklevel=2)
            continue
        genes.append(build_gene(name, config, found=_found(target, config.groups, backend)))
    return tuple(genes)


class Expression:
    """Writes one member's values into its engine.

    Args:
        genes: the genome's genes.
        backend: the member's engine.
        setters: by target, for genes that the user registered.
    """

    def __init__(self, genes: Sequence[Gene], backend: Backend, setters: Mapping[str, Setter]) -> None:
        self._backend = backend
        self._in_groups = [gene for gene in genes if gene.target in _GROUP_KEYS]
        self._between_steps = [gene for gene in genes if gene.target not in _GROUP_KEYS]
        self._setters = dict(setters)
        self._found = {gene.name: _found(gene.target, gene.groups, backend) for gene in self._between_steps}
        self._clip, self._accumulation = backend.clip, backend.accumulation
        self._dropouts = [(module, module.p) for module in _dropouts(backend.module)]
        self._values: Mapping[str, float] = {}

    def express(self, values: Mapping[str, float], *, batch_factor: int = 1) -> None:
        """Makes ``values`` (by gene name) the ones in effect from the next step on.

        Args:
            values: this member's.
            batch_factor: how many times its usual number of micro-batches the member accumulates.
        """
        self._values = dict(values)
        for gene in self._between_steps:
            if gene.target != "accumulation":
                self._set(gene.target, self._in_effect(gene, values[gene.name]))
        wanted = self.accumulation(values) * batch_factor
        if self._backend.accumulation != wanted:
            self._backend.accumulation = wanted

    def accumulation(self, values: Mapping[str, float]) -> int:
        """Micro-batches per step that a member with these values takes."""
        for gene in self._between_steps:
            if gene.target == "accumulation":
                return round(self._in_effect(gene, values[gene.name]))
        return self._accumulation

    def restore(self) -> None:
        """Clip threshold, accumulation and dropout rates as they were found; the user's setters are the user's."""
        self._backend.clip = self._clip
        if self._backend.accumulation != self._accumulation:
            self._backend.accumulation = self._accumulation
        for module, rate in self._dropouts:
            module.p = rate

    def _in_effect(self, gene: Gene, value: float) -> float:
        base = self._found[gene.name]
        return gene.expressed(value * base if gene.relative and base is not None else value)

    @contextmanager
    def during_update(self, lr_factor: float = 1.0) -> Iterator[None]:
        """The optimizer's groups hold the values inside and the scheduled ones again outside.

        Args:
            lr_factor: on every group's learning rate, beside any gene.

        Raises:
            ClanError: if a group does not hold what was written (another hook wrote after this one).
        """
        groups = self._backend.param_groups()
        before = [{key: group[key] for key, _ in _GROUP_KEYS.values() if key in group} for group in groups]
        for gene in self._in_groups:
            for group in _chosen(groups, gene.groups):
                _write(group, gene, self._values[gene.name])
        for group in groups:
            group["lr"] = group["lr"] * lr_factor
        try:
            yield
        finally:
            for group, scheduled in zip(groups, before, strict=True):
                group.update(scheduled)

    def learning_rate(self, lr_factor: float = 1.0) -> float:
        """The first group's learning rate as the next update will use it."""
        with self.during_update(lr_factor):
            return float(self._backend.param_groups()[0]["lr"])

    def _set(self, target: str, value: float) -> None:
        if target in self._setters:
            self._setters[target](value)
        elif target == "clip":
            self._backend.clip = value
        elif target == "dropout":
            for module, _ in self._dropouts:
                module.p = value


def _write(group: dict[str, Any], gene: Gene, value: float) -> None:
    """Writes one gene into one group and reads it back."""
    key, place = _GROUP_KEYS[gene.target]
    if key not in group:
        return
    scheduled = group[key] if place is None else group[key][place]
    wanted = scheduled * value if gene.relative else value
    if isinstance(group[key], torch.Tensor):
        group[key] = torch.full_like(group[key], float(wanted))
    else:
        group[key] = wanted if place is None else tuple(wanted if i == place else v for i, v in enumerate(group[key]))
    held = float(group[key] if place is None else group[key][place])
    if not math.isclose(held, float(wanted), rel_tol=1e-6):
        raise ClanError(
            f"gene {gene.name!r} wrote {float(wanted):g} to the optimizer's {key} and read back {held:g}. "
            f"Something else writes {key} inside the optimizer's step: remove it, or leave the gene out."
        )


def _chosen(groups: Sequence[dict[str, Any]], names: tuple[str, ...] | list[str] | None) -> list[dict[str, Any]]:
    """The groups with these names (their ``"name"``, else their index); all where there are none given."""
    if names is None:
        return list(groups)
    return [group for index, group in enumerate(groups) if str(group.get("name", index)) in names]


def _dropouts(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Every module whose rate ``p`` drops something."""
    return [
        part for part in module.modules() if isinstance(getattr(part, "p", None), float) and "Drop" in type(part).__name__
    ]


def _found(target: str, names: Sequence[str] | None, backend: Backend) -> float | None:
    """The value that the engine has for a target now, or None where it has none."""
    if target in _GROUP_KEYS:
        key, place = _GROUP_KEYS[target]
        for group in _chosen(backend.param_groups(), list(names) if names else None):
            if key in group:
                return float(group[key] if place is None else group[key][place])
    if target == "clip" and backend.clip > 0:
        return backend.clip
    if target == "accumulation":
        return float(backend.accumulation)
    if target == "dropout":
        rates = [part.p for part in _dropouts(backend.module)]
        return sum(rates) / len(rates) if rates else None
    return None


def _why_without_effect(
    target: str, config: GeneConfig, backend: Backend, setters: Mapping[str, Setter]
) -> str | None:
    """Why a gene would change nothing here, or None where it would (or where building it says more)."""
    if target in setters:
        return None
    if target in _GROUP_KEYS:
        groups = backend.param_groups()
        names = [str(group.get("name", index)) for index, group in enumerate(groups)]
        chosen = _chosen(groups, config.groups)
        key, place = _GROUP_KEYS[target]
        if not chosen:
            return f"no parameter group is called {' or '.join(config.groups or [])}; there are {', '.join(names)}"
        if not any(key in group for group in chosen):
            return f"the optimizer has no {key}; its groups hold {', '.join(k for k in chosen[0] if k != 'params')}"
        is_relative = config.mode == "relative" or (config.mode is None and target in ("lr", "weight_decay"))
        if is_relative and place is None and not any(float(group.get(key, 0.0)) for group in chosen) and target != "lr":
            return f"it multiplies {key}, which is 0 in every group; set a {key}, or the gene's mode to absolute"
        return None
    if target == "dropout" and not _dropouts(backend.module):
        return "the model has no dropout module with a rate p"
    if target in ("clip", "accumulation", "dropout"):
        if target == "clip" and backend.clip <= 0 and config.initial is None:
            return "gradient_clipping is off; set it, or give the gene an initial threshold"
        return None
    if None not in (config.kind, config.scale, config.bounds, config.initial):
        return f"no setter is registered for {target!r}; pass gene_setters={{{target!r}: ...}} to initialize()"
    return None
