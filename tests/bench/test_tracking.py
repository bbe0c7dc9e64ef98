"""The measurement itself, on rounds too short to mean anything."""

from __future__ import annotations

import pytest

from clantune_scale.bench import tracking


@pytest.mark.slow
def test_each_kind_is_measured_and_writing_is_seen():
    table = tracking.measure(tracking.in_python, num_rounds=3, num_members=4, round_s=0.01)
    assert tuple(table) == tracking.KINDS and table["none"][1] == 0.0
    # A round's seven lines go to the kernel one by one; without a writer emit returns at its first line.
    assert table["file"][0] > 2 * table["none"][0]
    assert table["mlflow"][0] < 0.5
