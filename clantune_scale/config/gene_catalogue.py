"""The genes that are known by name, their defaults, and how a configured gene becomes a :class:`Gene`."""

from __future__ import annotations

from dataclasses import replace

from clantune_scale.config.schema import GeneConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.spelling import did_you_mean
from clantune_scale.errors import ConfigError

# Relative genes multiply the user's own schedule and start at 1; the others start at the value that the engine has.
# Steps and changes are in scale units (natural logarithms, log-odds, or the value itself).
CATALOGUE: dict[str, Gene] = {
    gene.name: gene
    for gene in (
        Gene("lr", bounds=(1e-3, 1e3), relative=True),
        Gene("weight_decay", bounds=(1e-2, 1e2), relative=True),
        Gene("beta1", scale="logit", bounds=(0.5, 0.99), initial=0.9, max_change=0.4),
        Gene("beta2", scale="logit", bounds=(0.8, 0.9999), initial=0.999, max_change=0.4),
        Gene("eps", bounds=(1e-12, 1e-2), initial=1e-8),
        Gene("momentum", scale="logit", bounds=(0.5, 0.995), initial=0.9, max_change=0.4),
        Gene("clip", bounds=(1e-3, 1e3)),
        Gene(
            "accumulation",
            kind="specialized",
            bounds=(1, 64),
            step_size=0.35,
            max_change=0.7,
            consensus="median",
            integer=True,
        ),
        Gene(
            "dropout",
            kind="specialized",
            scale="linear",
            bounds=(0.0, 0.5),
            initial=0.1,
            step_size=0.03,
            max_change=0.1,
        ),
    )
}
_NEEDED = ("kind", "scale", "bounds", "initial")


def target_of(name: str, config: GeneConfig) -> str:
    """What the gene called ``name`` sets: its ``target``, or its name up to the colon."""
    return config.target or name.partition(":")[0]


def build_gene(name: str, config: GeneConfig, *, found: float | None = None) -> Gene:
    """The gene that a config entry describes, completed from the catalogue.

    Args:
        name: its key in ``genes``, for example ``"lr"`` or ``"lr:head"``.
        config: its entry.
        found: the value that the engine has for its target; the start of an absolute gene without
            ``initial``.

    Raises:
        ConfigError: if the target is unknown and not fully described, a labelled gene names no groups,
            there is no value to start from, or the start lies outside the bounds.
    """
    target = target_of(name, config)
    if ":" in name and not config.groups:
        raise ConfigError(
            f"gene {name!r} has a label and no parameter groups. "
            f'Name the groups that it is written to: "{name}": {{"groups": ["..."]}}.'
        )
    template = CATALOGUE.get(target) or _registered(name, target, config)
    relative = template.relative if config.mode is None else config.mode == "relative"
    initial, origin = _initial(name, template, config, relative=relative, found=found)
    bounds = config.bounds or _bounds(template, relative=relative)
    if not bounds[0] <= initial <= bounds[1]:
        raise ConfigError(
            f"gene {name!r} starts at {initial:g} ({origin}), outside its bounds [{bounds[0]:g}, {bounds[1]:g}]. "
            f"Set genes.{name}.bounds around it, or genes.{name}.initial inside them."
        )
    given = config.model_dump(include={"kind", "scale", "step_size", "max_change", "consensus", "integer"})
    return replace(
        template,
        name=name,
        target=target,
        groups=tuple(config.groups) if config.groups else None,
        bounds=bounds,
        initial=initial,
        relative=relative,
        **{key: value for key, value in given.items() if value is not None},
    )


def _registered(name: str, target: str, config: GeneConfig) -> Gene:
    """The template of a gene that the user registers with a setter: all that it needs is in its entry."""
    kind, scale, bounds, initial = config.kind, config.scale, config.bounds, config.initial
    if kind is None or scale is None or bounds is None or initial is None:
        missing = [key for key in _NEEDED if getattr(config, key) is None]
        raise ConfigError(
            f"gene {name!r} sets {target!r}, which is none of {', '.join(CATALOGUE)}."
            f"{did_you_mean(target, CATALOGUE)} "
            f"For a scalar of your own, register a setter and add {', '.join(missing)} to genes.{name}."
        )
    return Gene(name, kind=kind, scale=scale, bounds=bounds, initial=initial)


def _bounds(template: Gene, *, relative: bool) -> tuple[float, float]:
    # Bounds of a factor say nothing about a value and the other way round: lr 1e-4 may not be refused as "below 1e-3".
    if relative == template.relative:
        return template.bounds
    return (1e-3, 1e3) if relative else (1e-8, 1e2)


def _initial(
    name: str, template: Gene, config: GeneConfig, *, relative: bool, found: float | None
) -> tuple[float, str]:
    if config.initial is not None:
        return config.initial, f"genes.{name}.initial"
    if relative:
        return 1.0, "the factor 1 of a relative gene"
    if found is not None:
        return float(found), "the engine's own value"
    raise ConfigError(
        f"gene {name!r} has no value to start from: the engine has none for {template.target!r}. "
        f"Set genes.{name}.initial."
    )
