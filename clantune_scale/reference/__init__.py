"""The whole method in one process, slow and obvious. Read ``clan.py`` first: every distributed clan agrees with it."""

from clantune_scale.reference.clan import ReferenceClan

__all__ = ["ReferenceClan"]
