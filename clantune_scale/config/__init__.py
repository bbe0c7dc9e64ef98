"""The ``clantune`` block: its schema, genes and their defaults, the files that it stands in, and what is refused."""
