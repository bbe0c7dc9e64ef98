"""What a clan costs a step: plain data parallelism against clans in groups and on the line, in turns.

``python -m clantune_scale.bench.sharing`` starts three sets of as many ranks over gloo: plain DeepSpeed on all of
them, a clan of two members in groups, and a clan on the line. Each pair of measurements takes some steps of plain data
parallelism, of the cooperative phase, of the competitive one and of the line, in an order that turns round from pair
to pair. The table has the median of the pairs' ratios and their quartiles. A ratio of one is no cost.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import TensorDataset

from clantune_scale.bench.ranks import Ranks, timed
from clantune_scale.config.schema import ClanConfig, StrategyConfig, TrackingConfig

KINDS = ("flat", "cooperative", "competitive", "line")
MICRO_BATCH = 8
Form = Literal["groups", "line"]


class Blocks(nn.Module):
    """The feed-forward half of a GPT: ``depth`` residual blocks of ``width x 4 width``; gives the loss.

    Args:
        width: features of a token.
        depth: number of blocks.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = tokens
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return (hidden - tokens.roll(1, dims=1)).square().mean()


@dataclass(frozen=True)
class SharingSetting:
    """What is measured.

    Attributes:
        ranks: in each of the two sets.
        members: of the clan; ``ranks / members`` ranks each.
        width, depth: of the model.
        steps: optimizer steps in one measurement.
        tokens: of a rank in a step, a multiple of the micro-batch of 8 samples.
    """

    ranks: int = 4
    members: int = 2
    width: int = 256
    depth: int = 6
    steps: int = 4
    tokens: int = 128


class SharingRank:
    """One rank's engine, plain or with a clan, and the steps it takes.

    Args:
        setting: what is measured.
        stage: of ZeRO.
        directory: where the clan leaves its traces; None for plain data parallelism.
        members: in groups or on the line.
    """

    def __init__(self, setting: SharingSetting, stage: int, directory: str | None, members: Form = "groups") -> None:
        import clantune_scale

        torch.manual_seed(0)
        model = Blocks(setting.width, setting.depth)
        self._tokens = torch.randn(MICRO_BATCH, setting.tokens // MICRO_BATCH, setting.width)
        # The clan's own lines would stand in the middle of the table.
        with redirect_stdout(io.StringIO()):
            self._engine, *_ = clantune_scale.initialize(
                model=model,
                model_parameters=list(model.parameters()),
                config=_ds_config(setting, stage, directory, members),
                eval_data=TensorDataset(self._tokens) if directory else None,
            )

    def train(self, kind: str, num_steps: int) -> float | int:
        """Mean seconds per step of a phase of this kind; with no steps, the number of collectives in one."""
        competing = self._engine.clan.phases.suspended() if kind == "competitive" else nullcontext()
        with competing:
            return timed(self._step, num_steps) if num_steps else self._count()

    def _step(self) -> None:
        self._engine.backward(self._engine(self._tokens))
        self._engine.step()

    def _count(self) -> int:
        from torch.distributed.tensor.debug import CommDebugMode

        with CommDebugMode() as mode:
            self._step()
        return mode.get_total_counts()


@dataclass(frozen=True)
class PairedStepTimes:
    """One ZeRO stage.

    Attributes:
        stage: of ZeRO.
        seconds: by kind, per step, one number for each pair.
        collectives: by kind, in one step of one rank.
    """

    stage: int
    seconds: dict[str, list[float]]
    collectives: dict[str, int]

    def ratio(self, kind: str) -> tuple[float, float, float]:
        """(lower quartile, median, upper quartile) of this kind's time over plain data parallelism's."""
        ratios = [own / flat for own, flat in zip(self.seconds[kind], self.seconds["flat"], strict=True)]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return low, median(ratios), high


def measure(setting: SharingSetting, stage: int, *, num_pairs: int) -> PairedStepTimes:
    """Starts both sets of ranks and times them in turns.

    Raises:
        ClanError: if a rank fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        flat = Ranks(setting.ranks, SharingRank, setting, stage, None)
        groups, line = (
            Ranks(setting.ranks, SharingRank, setting, stage, f"{directory}/{members}", members)
            for members in ("groups", "line")
        )
        sets = {"flat": flat, "cooperative": groups, "competitive": groups, "line": line}
        try:
            return _in_turns(sets, setting, stage, num_pairs)
        finally:
            for ranks in (flat, groups, line):
                ranks.close()


def _in_turns(sets: dict[str, Ranks], setting: SharingSetting, stage: int, num_pairs: int) -> PairedStepTimes:
    for kind in KINDS:
        # ZeRO 3 records the order of its parameters before it prefetches, and begins anew after an evaluation.
        sets[kind].train(kind, 4)
    collectives = {kind: sets[kind].train(kind, 0)[0] for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for pair in range(num_pairs):
        for kind in KINDS if pair % 2 == 0 else reversed(KINDS):
            seconds[kind].append(max(sets[kind].train(kind, setting.steps)))
    return PairedStepTimes(stage, seconds, collectives)


def table(measurements: Sequence[PairedStepTimes]) -> str:
    """The measurements as a Markdown table, a row for each stage."""
    rows = [
        "| ZeRO | flat, ms a step | cooperative / flat | competitive / flat | line / flat | collectives, likewise |",
        "|---|---|---|---|---|---|",
    ]
    for measured in measurements:
        ratios = []
        for kind in KINDS[1:]:
            low, middle, high = measured.ratio(kind)
            ratios.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        counts = ", ".join(str(measured.collectives[kind]) for kind in KINDS)
        milliseconds = 1000 * median(measured.seconds["flat"])
        rows.append(f"| {measured.stage} | {milliseconds:.1f} | {' | '.join(ratios)} | {counts} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    defaults = SharingSetting()
    parser = argparse.ArgumentParser(
        prog="python -m clantune_scale.bench.sharing", description="Times clan steps against plain data parallelism."
    )
    for name in ("ranks", "members", "width", "depth", "steps", "tokens"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4), help="of ZeRO")
    parser.add_argument("--pairs", type=int, default=12, help="measurements of each kind")
    given = vars(parser.parse_args(arguments))
    stages, num_pairs = given.pop("stages"), given.pop("pairs")
    setting = SharingSetting(**given)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in Blocks(setting.width, setting.depth).parameters())
    print(
        f"{setting.ranks} ranks over gloo, clan of {setting.members}, {size / 1e6:.2f} M parameters in float32, "
        f"{setting.tokens} tokens a rank and step; {num_pairs} pairs of {setting.steps} steps: median (quartiles)"
    )
    print(table([measure(setting, stage, num_pairs=num_pairs) for stage in stages]))
    return 0


def _ds_config(setting: SharingSetting, stage: int, directory: str | None, members: Form) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    if directory:
        # One endless round: what is timed is a step, not an evaluation. On the line it is one that searches, whose
        # steps update the average of the weights.
        is_line = members == "line"
        strategy = StrategyConfig(name="clan", options={"trial_cost": 0}) if is_line else StrategyConfig(name="control")
        config["clantune"] = ClanConfig(
            population_size=4 if is_line else setting.members,
            members=members,
            round_length=10**9,
            strategy=strategy,
            tracking=TrackingConfig(directory=directory, mlflow=False, print_every_steps=10**9),
        ).model_dump()
    return config


if __name__ == "__main__":
    sys.exit(main())
