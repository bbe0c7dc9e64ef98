"""Which samples each rank reads, the loaders that follow a clan's phases, and a watch over the batches that come."""
