"""The transports' benchmark: pairs, turns, and a table of real ranks."""

from __future__ import annotations

import re

from clantune_scale.bench.transfer import TRANSPORTS, in_turns, main, table


class FakeRanks:
    """Two ranks, of which the second takes twice as long."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def train(self, kind: str, num_steps: int) -> list[float]:
        self.calls.append(kind)
        return [0.1 * num_steps, 0.2 * num_steps]


def test_the_order_turns_round_and_the_slowest_rank_counts():
    ranks = FakeRanks()
    assert in_turns(ranks, 2) == {kind: [0.2, 0.2] for kind in TRANSPORTS}
    assert ranks.calls == [*TRANSPORTS, *TRANSPORTS, *reversed(TRANSPORTS)]


def test_ratios_are_taken_pair_by_pair():
    # The machine was ten times as busy in the second pair: a ratio of medians would not be 0.5.
    seconds = {"peer": [0.1, 1.0, 0.2], "dcp_files": [0.2, 2.0, 0.4]}
    rows = table(seconds, 10).splitlines()
    assert rows[3] == "| dcp_files | 25 (15 to 38) | 0.50 (0.50 to 0.50) |"


def test_the_command_prints_a_row_for_each_transport(capfd):
    assert main(["--mebibytes", "1", "--tensors", "4", "--bucket-mebibytes", "1", "--pairs", "2"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0] == "2 ranks over gloo, 1 MiB in 4 tensors on each, one donor; 2 pairs"
    spread = r"\d+ \(\d+ to \d+\) \| \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)"
    for kind, row in zip(TRANSPORTS, out[3:], strict=True):
        assert re.fullmatch(rf"\| {kind} \| {spread} \|", row), row
