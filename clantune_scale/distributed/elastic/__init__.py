"""Elastic membership: when members die, the surviving ranks restart and continue as a generation of fewer members.

A training step cannot be rolled back inside a user's loop, and communicators with a dead rank cannot be trusted. So a
process that sees another one fail restarts itself in place (``exec``, so the launcher sees the same process). It joins
the clan again and resumes from the last committed round.

- ``failures``: which errors mean that another process is gone.
- ``heartbeat``: every rank watches one other rank through the clan's store, and learns of failures there.
- ``restart``: restarts this process.
- ``generation``: what a process remembers of the generation before, in one environment variable.
- ``quorum``: the rendezvous of a new generation, and the members that are complete when it closes.
- ``entry``: a rank's entry into the first generation or a later one.
- ``supervisor``: decides on restart or end. It is the only object of these that the clan knows.
- ``waiting``: waiting for slow ranks that are alive.
"""
