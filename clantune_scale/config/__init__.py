"""The ``clantune`` block: its schema, the gene catalogue, the files that hold the block, and what is refused."""

from clantune_scale.config.gene_catalogue import build_gene
from clantune_scale.config.schema import ClanConfig, GeneConfig

__all__ = ["ClanConfig", "GeneConfig", "build_gene"]
