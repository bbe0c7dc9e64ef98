"""``python -m clantune_scale.tracking.report RUN_DIR``: what :func:`write_report` does, in a process of its own."""

from __future__ import annotations

import sys

from clantune_scale.errors import ClanError
from clantune_scale.tracking.report import write_report

if __name__ == "__main__":
    try:
        print(write_report(sys.argv[1]))
    except ClanError as error:
        sys.exit(str(error))
