"""What can go wrong, as a user meets it: one sentence with the values in it, one that says what to change."""


class ClanError(RuntimeError):
    """Base of every error that this package raises on purpose."""


class ConfigError(ClanError, ValueError):
    """The ``clantune`` block, or what was passed beside it, cannot be used as it is."""


class TopologyError(ClanError, ValueError):
    """The ranks that the launcher started do not form the clan that the config asks for."""


class EvaluationError(ClanError):
    """The common validation window gave no fitness that selection could use."""


class TransferError(ClanError):
    """State that was copied from one member to another did not arrive as it was sent.

    Attributes:
        members: those whose state is inconsistent, equal on all ranks; empty if only this rank is concerned.
    """

    members: tuple[int, ...] = ()


class DivergenceError(ClanError):
    """Ranks that must agree (on a decision, a layout, a genome) do not."""


class NoEffectWarning(UserWarning):
    """A setting was accepted and changes nothing."""


class CheckpointError(ClanError):
    """A round cannot be written down, or what was written cannot be continued from."""


class MembersLostError(ClanError):
    """Members died, and the run cannot go on with those that are left, or this process is not among them."""
