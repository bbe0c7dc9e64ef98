"""Applies a genome to an engine: writes each gene before the update, checks it afterwards, restores the old values.

Optimizer genes are in the optimizer's groups only during its update. Otherwise, a scheduler that multiplies the last
value (``ExponentialLR``) would apply the gene again at every step. No schedule changes clip threshold, accumulation,
dropout or the user's setters: they are set between steps and keep their values.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.config.gene_catalogue import build_gene, target_of
from clantune_scale.config.schema import GeneConfig
from clantune_scale.core import decay
from clantune_scale.core.genome import GROUP_KEYS, Gene, chosen_groups, replaces_schedule
from clantune_scale.errors import ClanError, ConfigError, NoEffectWarning
from clantune_scale.runtime.engine_protocol import TunedEngine

#: Where a parameter group keeps its scheduled learning rate of the last step before the final decay. Torch's
#: schedulers keep ``initial_lr`` there too: a group's settings are saved with the optimizer and with a round.
REFERENCE_KEY = "clantune_lr"

Setter = Callable[[float], None]
_SHARES = {"lr": "lr_mult", "weight_decay": "wd_mult"}


def bind_genes(
    configs: Mapping[str, GeneConfig],
    backend: TunedEngine,
    setters: Mapping[str, Setter],
    *,
    quiet: Collection[str] = (),
) -> tuple[Gene, ...]:
    """The genes of a config; a gene without an initial value starts from the engine's.

    A gene that sets nothing in this engine is left out with a :class:`NoEffectWarning`, or silently if ``quiet`` names
    it. A setter that no gene calls gets a warning too.

    Raises:
        ConfigError: if a gene cannot be built (see :func:`clantune_scale.config.gene_catalogue.build_gene`).
    """
    for target in setters.keys() - {target_of(name, config) for name, config in configs.items()}:
        warnings.warn(
            f"gene_setters[{target!r}] has no effect: no gene sets it. Add {target!r} to clantune.genes.",
            NoEffectWarning,
            stacklevel=2,
        )
    genes = []
    for (name, config), seen in zip(configs.items(), _seen_by_member(configs, backend, setters), strict=True):
        if seen.reason:
            if name not in quiet:
                text = f"gene {name!r} has no effect: {seen.reason}. It is left out."
                warnings.warn(text, NoEffectWarning, stacklevel=2)
            continue
        if seen.missing:
            text = f"gene {name!r} has no effect on {', '.join(seen.missing)}: no parameter group has that name."
            warnings.warn(text, NoEffectWarning, stacklevel=2)
        genes.append(build_gene(name, config, found=seen.found))
    return tuple(genes)


@dataclass(frozen=True)
class _Seen:
    """A gene's effect in an engine: the reason if it has none, missing parameter groups, the present value."""

    reason: str | None
    missing: list[str]
    found: float | None


def _seen_by_member(
    configs: Mapping[str, GeneConfig], backend: TunedEngine, setters: Mapping[str, Setter]
) -> list[_Seen]:
    """By gene; the same on all ranks of a member, whose pipeline stages hold different modules and groups."""
    seen = []
    for name, config in configs.items():
        target = target_of(name, config)
        reason = _why_without_effect(target, config, backend, setters)
        found = None if reason else _found(target, config.groups, backend)
        seen.append(_Seen(reason, _missing_groups(target, config, backend), found))
    if getattr(backend, "pp_size", 1) == 1:
        return seen
    # The member has what one of its stages has: the maximum of flags, and of values, which are mostly equal.
    present = [
        [name not in one.missing for name in c.groups or []] for one, c in zip(seen, configs.values(), strict=True)
    ]
    numbers = [
        [one.reason is None, one.found is not None, -math.inf if one.found is None else one.found, *flags]
        for one, flags in zip(seen, present, strict=True)
    ]
    everyone = torch.tensor([float(n) for row in numbers for n in row], dtype=torch.float64, device=backend.device)
    dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
    agreed = []
    for one, config, row in zip(seen, configs.values(), everyone.split([len(row) for row in numbers]), strict=True):
        has_effect, has_value, value, *flags = row.tolist()
        missing = [name for name, flag in zip(config.groups or [], flags, strict=True) if not flag]
        agreed.append(_Seen(None if has_effect else one.reason, missing, value if has_value else None))
    return agreed


class Expression:
    """Writes one member's values into its engine.

    Args:
        genes: the genome's genes.
        backend: the member's engine.
        setters: by target, for genes that the user registered; a setter replaces the package's own effect.
    """

    def __init__(self, genes: Sequence[Gene], backend: TunedEngine, setters: Mapping[str, Setter]) -> None:
        self._backend = backend
        self._in_groups = [gene for gene in genes if gene.target in GROUP_KEYS and gene.target not in setters]
        self._between_steps = [gene for gene in genes if gene not in self._in_groups]
        self._setters = dict(setters)
        self._found = {gene.name: _found(gene.target, gene.groups, backend) for gene in self._between_steps}
        self._clip, self._accumulation = backend.clip, backend.accumulation
        self._dropouts = [(module, name, getattr(module, name)) for module, name in _dropouts(backend.module)]
        self._values: Mapping[str, float] = {}
        self._batch_factor = 1

    def follow(self, accumulation: int) -> None:
        """Takes over a number of micro-batches per step that the user's script sets, in place of the engine's first.

        Raises:
            ConfigError: if a gene sets it.
        """
        if any(gene.target == "accumulation" for gene in self._between_steps):
            raise ConfigError(
                f"the script asks for {accumulation} micro-batches per step and member, and the gene 'accumulation' "
                f"sets them. Take the gene out of clantune.genes, or leave the batch size to it."
            )
        self._accumulation = accumulation
        self._backend.accumulation = accumulation * self._batch_factor

    def express(self, values: Mapping[str, float], *, batch_factor: int = 1) -> None:
        """Puts ``values`` (by gene name) into effect from the next step on.

        Args:
            values: this member's.
            batch_factor: how many times its usual number of micro-batches the member accumulates.
        """
        self._values = dict(values)
        for gene in self._between_steps:
            self._set(gene, values[gene.name])
        self._batch_factor = batch_factor
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
        """Restores groups, clip threshold, accumulation and dropout rates; the user's setters are not called."""
        for group in self._backend.param_groups():
            group.pop(REFERENCE_KEY, None)
        self._backend.clip = self._clip
        if self._backend.accumulation != self._accumulation:
            self._backend.accumulation = self._accumulation
        for module, name, rate in self._dropouts:
            setattr(module, name, rate)

    def _in_effect(self, gene: Gene, value: float) -> float:
        base = self._found[gene.name]
        return gene.expressed(value * base if gene.relative and base is not None else value)

    @contextmanager
    def during_update(self, lr_factor: float = 1.0) -> Iterator[None]:
        """Inside, the optimizer's groups hold the genes' values; on exit, the scheduled ones again.

        Args:
            lr_factor: the final decay's share (see ``Strategy.lr_factor``), of every group.

        Raises:
            ClanError: if a group no longer holds after the update what was written before it.
        """
        for group in self._backend.param_groups():
            if lr_factor == 1.0 or REFERENCE_KEY not in group:
                group[REFERENCE_KEY] = float(group["lr"])
        with self._written(lr_factor):
            yield

    @contextmanager
    def _written(self, lr_factor: float) -> Iterator[None]:
        groups = self._backend.param_groups()
        before = [{key: group[key] for key, _ in GROUP_KEYS.values() if key in group} for group in groups]
        try:
            for gene in self._in_groups:
                for group in chosen_groups(groups, gene.groups):
                    _write(group, gene, self._values[gene.name])
            for group, scheduled in zip(groups, before, strict=True):
                # Not in place: it may be a tensor.
                group["lr"] = group["lr"] * self._rate_factor(group, float(scheduled["lr"]), lr_factor)
            written = [{key: group[key] for key in scheduled} for group, scheduled in zip(groups, before, strict=True)]
            yield
            self._read_back(groups, written)
        finally:
            for group, scheduled in zip(groups, before, strict=True):
                group.update(scheduled)

    def _rate_factor(self, group: dict[str, Any], scheduled: float, lr_factor: float) -> float:
        """The final decay's factor on a group's learning rate."""
        if replaces_schedule(self._in_groups, group, self._backend.param_groups()):
            return lr_factor
        return decay.under_ceiling(lr_factor, reference=group.get(REFERENCE_KEY, scheduled), scheduled=scheduled)

    def _read_back(self, groups: Sequence[dict[str, Any]], written: Sequence[dict[str, Any]]) -> None:
        """Checks that nothing overwrote the genes' values during the update."""
        for group, expected in zip(groups, written, strict=True):
            for gene in self._in_groups:
                key, place = GROUP_KEYS[gene.target]
                if key not in expected or not any(group is chosen for chosen in chosen_groups(groups, gene.groups)):
                    continue
                wanted, held = (float(g[key] if place is None else g[key][place]) for g in (expected, group))
                if not math.isclose(held, wanted, rel_tol=1e-6):
                    raise ClanError(
                        f"gene {gene.name!r} wrote {wanted:g} to the optimizer's {key} and read back {held:g} after "
                        f"the update. Something else writes {key} inside the optimizer's step: remove it, or leave "
                        f"the gene out."
                    )

    def learning_rate(self, lr_factor: float = 1.0) -> float:
        """The first group's learning rate as the next update will use it."""
        with self._written(lr_factor):
            return float(self._backend.param_groups()[0]["lr"])

    @property
    def scheduled_rate(self) -> float:
        """The first group's present learning rate by the user's own schedule."""
        return float(self._backend.param_groups()[0]["lr"])

    def _set(self, gene: Gene, value: float) -> None:
        if gene.target in self._setters:
            self._setters[gene.target](self._in_effect(gene, value))
        elif gene.target == "clip":
            self._backend.clip = self._in_effect(gene, value)
        elif gene.target == "dropout":
            for module, name, rate in self._dropouts:
                # A relative gene keeps the user's proportions between modules; torch refuses values above 1.
                setattr(module, name, min(rate * value, 1.0) if gene.relative else value)


def _write(group: dict[str, Any], gene: Gene, value: float) -> None:
    """Writes one gene into one group that has a place for it."""
    key, place = GROUP_KEYS[gene.target]
    if key not in group:
        return
    scheduled = group[key] if place is None else group[key][place]
    # Megatron-core's groups say which share of a common value they take; norms and biases take no weight decay.
    wanted = scheduled * value if gene.relative else value * group.get(_SHARES.get(key, ""), 1.0)
    if isinstance(group[key], torch.Tensor):
        group[key] = torch.full_like(group[key], float(wanted))
    else:
        group[key] = wanted if place is None else tuple(wanted if i == place else v for i, v in enumerate(group[key]))


def _dropouts(module: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """Every dropout rate of the model: a module and the name of its attribute.

    Dropout modules call it ``p``. Layers that drop by function, like Megatron-core's, call it ``hidden_dropout``.
    """
    return [
        (part, name)
        for part in module.modules()
        for name in ("p", "hidden_dropout")
        if isinstance(getattr(part, name, None), int | float) and (name != "p" or "Drop" in type(part).__name__)
    ]


def _found(target: str, names: Sequence[str] | None, backend: TunedEngine) -> float | None:
    """The value that the engine has for a target now, or None if it has none."""
    if target in GROUP_KEYS:
        key, place = GROUP_KEYS[target]
        for group in chosen_groups(backend.param_groups(), list(names) if names else None):
            if group.get(key) is not None:
                return float(group[key] if place is None else group[key][place])
    if target == "clip" and backend.clip > 0:
        return backend.clip
    if target == "accumulation":
        return float(backend.accumulation)
    if target == "dropout":
        rates = [getattr(part, name) for part, name in _dropouts(backend.module)]
        return sum(rates) / len(rates) if rates else None
    return None


def group_names(param_groups: Sequence[dict[str, Any]]) -> list[str]:
    """Each parameter group's ``"name"``, else its index."""
    return [str(group.get("name", index)) for index, group in enumerate(param_groups)]


def _missing_groups(target: str, config: GeneConfig, backend: TunedEngine) -> list[str]:
    """The names in a gene's ``groups`` that no parameter group has."""
    names = group_names(backend.param_groups())
    return [name for name in config.groups or [] if target in GROUP_KEYS and name not in names]


def _why_without_effect(
    target: str, config: GeneConfig, backend: TunedEngine, setters: Mapping[str, Setter]
) -> str | None:
    """Why a gene has no effect here; None if it has one, or if building it raises a better message."""
    if target in setters:
        return None
    if target in GROUP_KEYS:
        groups = backend.param_groups()
        chosen = chosen_groups(groups, config.groups)
        key, place = GROUP_KEYS[target]
        if not chosen:
            there_are = ", ".join(group_names(backend.param_groups()))
            return f"no parameter group is called {' or '.join(config.groups or [])}; there are {there_are}"
        if not any(key in group for group in chosen):
            return f"the optimizer has no {key}; its groups hold {', '.join(k for k in chosen[0] if k != 'params')}"
        is_relative = config.mode == "relative" or (config.mode is None and target in ("lr", "weight_decay"))
        if is_relative and place is None and not any(float(group.get(key, 0.0)) for group in chosen) and target != "lr":
            return f"it multiplies {key}, which is 0 in every group; set a {key}, or the gene's mode to absolute"
        return None
    if target == "dropout" and not _dropouts(backend.module):
        return "the model has no dropout module with a rate p"
    if target == "clip" and backend.clip <= 0 and (config.initial is None or config.mode == "relative"):
        return "gradient_clipping is off; set it, or give the gene an initial threshold and no relative mode"
    if target == "dropout" and config.mode == "relative" and not _found(target, None, backend):
        return "it multiplies dropout rates that are 0; set a rate, or the gene's mode to absolute"
    if target in ("clip", "accumulation", "dropout"):
        return None
    if None not in (config.kind, config.scale, config.bounds, config.initial):
        return f"no setter is registered for {target!r}; pass gene_setters={{{target!r}: ...}} to initialize()"
    return None
