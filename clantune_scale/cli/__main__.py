"""``python -m clantune_scale.cli``: the same as ``clantune``."""

from __future__ import annotations

import sys

from clantune_scale.cli.main import main

sys.exit(main())
