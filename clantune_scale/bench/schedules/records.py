"""Records as JSON has them: no number in it that is not one."""

from __future__ import annotations

import math
from typing import Any


def finite(record: Any) -> Any:
    """``record`` with null in place of every float that is infinite or not a number; tuples become lists."""
    if isinstance(record, dict):
        return {key: finite(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [finite(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record
