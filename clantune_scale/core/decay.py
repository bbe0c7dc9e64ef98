"""The final decay: a line to zero, and how it combines with the user's own learning-rate schedule."""

from __future__ import annotations


def line(step: int, *, start_step: int, total_steps: int) -> float:
    """1 up to ``start_step``, then linear to 0 at ``total_steps`` and beyond."""
    return min(max((total_steps - step) / (total_steps - start_step), 0.0), 1.0)


def under_ceiling(factor: float, *, reference: float, scheduled: float) -> float:
    """The factor that lowers a learning rate to the smaller of the user's own and ``reference x factor``.

    Two decays multiplied would decay twice. It is exactly ``factor`` if the user's schedule has not moved, so that
    a constant learning rate times it is the line to the last bit.

    Args:
        factor: the decay's, 0 to 1.
        reference: the user's own learning rate in the last step before the decay (when ``factor`` was 1).
        scheduled: the user's own learning rate now.
    """
    if scheduled == 0:
        return 1.0
    return min(1.0, factor * (reference / scheduled))
