from __future__ import annotations

import re

import pytest

from clantune_scale.bench.ranks import Ranks
from clantune_scale.bench.sharing import PairedStepTimes, SharingSetting, _in_turns, main, table
from clantune_scale.errors import ClanError


def test_ratios_are_taken_pair_by_pair():
    # The machine was ten times as busy in the second pair: a ratio of medians would not be 1.5.
    seconds = {"flat": [0.1, 1.0, 0.2], "cooperative": [0.15, 1.5, 0.32], "competitive": [0.1, 0.8, 0.2]}
    seconds["line"] = [0.11, 1.0, 0.2]
    measured = PairedStepTimes(2, seconds, {"flat": 3, "cooperative": 3, "competitive": 4, "line": 3})
    assert measured.ratio("cooperative") == pytest.approx((1.5, 1.5, 1.55))
    assert measured.ratio("competitive") == pytest.approx((0.9, 1.0, 1.0))
    ratios = "1.50 (1.50 to 1.55) | 1.00 (0.90 to 1.00) | 1.00 (1.00 to 1.05)"
    assert table([measured]).splitlines()[2] == f"| 2 | 200.0 | {ratios} | 3, 3, 4, 3 |"


class FakeRanks:
    """Two ranks, of which the second takes twice as long."""

    def __init__(self, calls: list) -> None:
        self.calls = calls

    def train(self, kind: str, num_steps: int) -> list:
        self.calls.append((kind, num_steps))
        return [5, 5] if num_steps == 0 else [0.1, 0.2]


def test_the_order_turns_round_and_the_slowest_rank_counts():
    calls: list = []
    kinds = ("flat", "cooperative", "competitive", "line")
    measured = _in_turns({kind: FakeRanks(calls) for kind in kinds}, SharingSetting(steps=7), 1, 2)
    assert [kind for kind, num_steps in calls if num_steps == 7] == [*kinds, *reversed(kinds)]
    assert measured.seconds == {kind: [0.2, 0.2] for kind in kinds}
    assert measured.collectives == dict.fromkeys(kinds, 5)


@pytest.mark.slow
@pytest.mark.timeout(400)  # twelve ranks start, and plain DeepSpeed may compile its collectives for the CPU
def test_the_command_prints_a_row_for_each_stage(capfd):
    sizes = ["--ranks", "4", "--width", "16", "--depth", "1", "--steps", "1", "--pairs", "2"]
    assert main([*sizes, "--stages", "3"]) == 0
    out = [line for line in capfd.readouterr().out.splitlines() if line.startswith(("|", "4 ranks"))]
    assert out[0].startswith(
        "4 ranks over gloo, clan of 2, 0.00 M parameters in float32, 128 tokens a rank and step; 2 pairs"
    )
    assert [line.count("|") for line in out[1:]] == [7] * 3
    ratio = r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)"
    found = re.fullmatch(rf"\| 3 \| \d+\.\d \| {ratio} \| {ratio} \| {ratio} \| (\d+), (\d+), (\d+), (\d+) \|", out[3])
    assert found, out
    flat, cooperative, competitive, line = map(int, found.groups())
    assert line == competitive == flat > 0
    # For each bucket ZeRO 3 adds an all-reduce over the replica group, where other stages put the clan's group in the
    # place of the member's, and the non-finite mask adds one.
    assert cooperative > flat and (cooperative - flat) % 2 == 0


def _fail(word):
    raise ValueError(word)


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_rank_that_fails_is_heard(has_ended):
    ranks = Ranks(2, _fail, "nothing works")
    try:
        for process in ranks.processes if has_ended else ():
            process.join()
        with pytest.raises(ClanError, match=r"(?s)rank 0 of 2 failed: .*ValueError: nothing works"):
            ranks.train("flat", 1)
    finally:
        ranks.close()
