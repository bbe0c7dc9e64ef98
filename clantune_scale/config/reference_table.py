"""The block's keys and the known genes as tables: ``python -m clantune_scale.config.reference_table`` prints them."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from clantune_scale.config.gene_catalogue import CATALOGUE
from clantune_scale.config.schema import ClanConfig, GeneConfig


def reference_table() -> str:
    """A Markdown table of every key, its default and its meaning."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    rows += [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in _rows(ClanConfig)]
    return "\n".join(rows)


def gene_table() -> str:
    """A Markdown table of the known genes and their defaults."""
    rows = ["| gene | kind | mode | scale | bounds | most per round |", "|---|---|---|---|---|---|"]
    for gene in CATALOGUE.values():
        mode = "relative" if gene.relative else "absolute"
        low, high = gene.bounds
        rows.append(
            f"| `{gene.name}` | {gene.kind} | {mode} | {gene.scale} | {low:g} to {high:g} | {gene.max_change:g} |"
        )
    return "\n".join(rows)


def _rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        key = prefix + name
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _rows(inner, f"{key}.")
            continue
        yield key, _default(field), " ".join((field.description or "").split())
        if name == "genes":
            yield from _rows(GeneConfig, "genes.NAME.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.default
    if isinstance(value, dict) and any(isinstance(inner, BaseModel) for inner in value.values()):
        value = {key: inner.model_dump(exclude_defaults=True) for key, inner in value.items()}
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    print(reference_table(), gene_table(), sep="\n\n")
