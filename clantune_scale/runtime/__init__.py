"""One rank while it trains: the clan and its phases, decisions, genes, validation, and the record of a run."""
