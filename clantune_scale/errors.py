"""Every exception of this package. A message says what is wrong, with the values, and then what to change."""


class ClanError(RuntimeError):
    """Base of every error that this package raises on purpose."""


class ConfigError(ClanError, ValueError):
    """The ``clantune`` block, or an argument beside it, cannot be used."""


class TopologyError(ClanError, ValueError):
    """The launcher's ranks do not form the clan that the config asks for."""


class EvaluationError(ClanError):
    """The common validation window gave no fitness that selection could use."""


class TransferError(ClanError):
    """A state that one member copied from another did not arrive as it was sent.

    Attributes:
        members: those whose state is inconsistent, equal on all ranks; empty if only this rank is concerned.
    """

    members: tuple[int, ...] = ()


class DivergenceError(ClanError):
    """Ranks that must agree on a decision, a layout or a genome do not."""


class CheckpointError(ClanError):
    """A round cannot be written, or a written round cannot be continued from."""


class MembersLostError(ClanError):
    """Members died, and the run cannot go on with the members that are left, or this process is not among them."""


class RecordingStopped(ClanError):
    """A recorder cannot go on; the message is the reason, for the user."""


class NoEffectWarning(UserWarning):
    """A setting was accepted and changes nothing."""
