"""Fixtures that several folders share."""

from __future__ import annotations

from tests.cli.calls import call
from tests.cli.finished_run import finished_run

__all__ = ["call", "finished_run"]
