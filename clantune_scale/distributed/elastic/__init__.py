"""Members that die: the others leave everything behind and come back, as an epoch of fewer members.

A training step cannot be rolled back inside a user's loop, and communicators of which a part is dead cannot be
trusted. So a process that sees another one fail starts itself again in place (``exec``: the launcher sees the same
process), joins through the same door, and goes on from the last committed round.

- ``failures``: which errors mean that another process is gone.
- ``heartbeat``: every rank watches one other by the clan's store, and hears there that somebody has seen a failure.
- ``restart``: this process, started again.
- ``generation``: what it remembers of the epoch before, in one environment variable.
- ``rendezvous``: who comes to an epoch; the roster of the members that are complete when it closes.
- ``supervisor``: the one object that the clan knows of these.
"""
