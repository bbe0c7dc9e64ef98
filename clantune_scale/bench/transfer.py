"""How fast a member's state becomes another's: the three transports between the same ranks, in turns.

``python -m clantune_scale.bench.transfer`` starts one set of ranks over gloo. Each pair of measurements moves one
state by every transport, in an order that turns round from pair to pair, proof by digests included. The table has
the median of each transport's speed and of the pairs' ratios to the default's, with their quartiles.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import torch

from clantune_scale.bench.ranks import Ranks
from clantune_scale.config.schema import TransferConfig

TRANSPORTS: tuple[Literal["peer", "dcp_files"], ...] = ("peer", "dcp_files")
_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class TransferSetting:
    """What is measured.

    Attributes:
        ranks: one per member; the first is the donor of all others.
        mebibytes: of a rank's state.
        tensors: of equal size that it consists of.
        bucket_mebibytes: of a message.
    """

    ranks: int = 2
    mebibytes: int = 64
    tensors: int = 48
    bucket_mebibytes: int = 32


class TransferRank:
    """One rank's state and the ways of moving it.

    Args:
        setting: what is measured.
        directory: that ``dcp_files`` uses.
    """

    def __init__(self, setting: TransferSetting, directory: str) -> None:
        from clantune_scale.distributed import world
        from clantune_scale.distributed.world import ClanGroups
        from clantune_scale.transfer import MemberState, Transfers

        joined = world.join(setting.ranks)
        groups = ClanGroups(joined, "cpu")
        bucket_bytes = setting.bucket_mebibytes * _MEBIBYTE
        self._transfers: dict[str, Transfers] = {
            name: Transfers.of(
                joined,
                groups,
                TransferConfig(transport=name, bucket_bytes=bucket_bytes, directory=directory),
                runs=Path(directory),
            )
            for name in TRANSPORTS
        }
        size = setting.mebibytes * _MEBIBYTE // 4 // setting.tensors
        tensors = [(str(index), torch.full((size,), float(joined.member))) for index in range(setting.tensors)]
        self._state = MemberState(tensors, {"optimizer": {}}, load_scalars=lambda _: None, refresh=lambda: None)
        self._member, self._donors = joined.member, [0] * setting.ranks

    def train(self, kind: str, num_steps: int) -> float:
        """Mean seconds of ``num_steps`` transfers by transport ``kind``, each of a state that differs."""
        spent = 0.0
        for _ in range(num_steps):
            if self._member:
                for _, tensor in self._state.tensors:
                    tensor.fill_(float(self._member))
            start = time.perf_counter()
            self._transfers[kind].run(self._state, self._donors)
            spent += time.perf_counter() - start
        return spent / max(num_steps, 1)


def measure(setting: TransferSetting, directory: Path, *, num_pairs: int) -> dict[str, list[float]]:
    """Seconds of the slowest rank by transport, one number for each pair.

    Raises:
        ClanError: if a rank fails.
    """
    ranks = Ranks(setting.ranks, TransferRank, setting, str(directory))
    try:
        return in_turns(ranks, num_pairs)
    finally:
        ranks.close()


def in_turns(ranks: Ranks, num_pairs: int) -> dict[str, list[float]]:
    """Each transport once in each pair, after one that is not counted."""
    for kind in TRANSPORTS:
        ranks.train(kind, 1)
    seconds: dict[str, list[float]] = {kind: [] for kind in TRANSPORTS}
    for pair in range(num_pairs):
        for kind in TRANSPORTS if pair % 2 == 0 else reversed(TRANSPORTS):
            seconds[kind].append(max(ranks.train(kind, 1)))
    return seconds


def table(seconds: dict[str, list[float]], mebibytes: float) -> str:
    """The measurements as a Markdown table, a row for each transport."""
    rows = ["| transport | MiB/s, median (quartiles) | of peer's speed |", "|---|---|---|"]
    for kind in TRANSPORTS:
        speeds = [mebibytes / spent for spent in seconds[kind]]
        ratios = [base / own for own, base in zip(seconds[kind], seconds["peer"], strict=True)]
        rows.append(f"| {kind} | {_spread(speeds, 0)} | {_spread(ratios, 2)} |")
    return "\n".join(rows)


def _spread(values: Sequence[float], digits: int) -> str:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return f"{median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    defaults = TransferSetting()
    parser = argparse.ArgumentParser(
        prog="python -m clantune_scale.bench.transfer", description="Times the transports of a member's state."
    )
    for name in ("ranks", "mebibytes", "tensors", "bucket_mebibytes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.add_argument("--pairs", type=int, default=8, help="measurements of each transport")
    parser.add_argument("--directory", type=Path, help="for dcp_files (default: a temporary one)")
    given = vars(parser.parse_args(arguments))
    num_pairs, directory = given.pop("pairs"), given.pop("directory")
    setting = TransferSetting(**given)
    print(
        f"{setting.ranks} ranks over gloo, {setting.mebibytes} MiB in {setting.tensors} tensors on each, one donor; "
        f"{num_pairs} pairs"
    )
    with tempfile.TemporaryDirectory() as temporary:
        seconds = measure(setting, directory or Path(temporary), num_pairs=num_pairs)
    print(table(seconds, setting.mebibytes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
