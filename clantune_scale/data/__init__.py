"""Which samples each rank reads, the loaders that follow a clan's phases, and checks of the batches."""
