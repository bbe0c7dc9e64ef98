"""The schedule benchmark: how many scheduling problems a strategy solves, and at what cost.

A scheduling problem is a task, an optimizer and a starting configuration that trains. ``python -m
clantune_scale.bench.schedules`` runs problems x methods x seeds and writes one table; ``LOG.md`` beside this
file has the experiments and their results.
"""
