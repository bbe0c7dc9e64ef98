"""One training script under several strategies and seeds at equal steps: a table of its last figures.

    python -m clantune_scale.bench.runs launch/pretrain_gpt.py configs/quickstart.json --methods fixed control clan

``fixed`` is the same script without a clan, on the same ranks and the same batch. A strategy with ``-line`` after its
name (``clan-line``) has its members on the line. The script must accept ``--seed`` and
print a line with each requested figure (``test loss 1.2345 ...``), measured on data that selection never sees. Every
run is a separate launch, one after the other. Its output is kept beside its results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clantune_scale.errors import ClanError

_ON_LINE = "-line"


@dataclass(frozen=True)
class Outcome:
    """How one launch ended.

    Attributes:
        method: strategy, or ``fixed``.
        seed: of the script and of the clan.
        figures: by name, from the script's last lines.
        seconds: of the whole launch.
    """

    method: str
    seed: int
    figures: dict[str, float]
    seconds: float


def config_of(base: dict[str, Any], method: str, seed: int, directory: Path) -> dict[str, Any]:
    """The script's DeepSpeed config for one launch."""
    block = {**base["clantune"], "seed": seed, "enabled": method != "fixed"}
    if method != "fixed":
        name = method.removesuffix(_ON_LINE)
        block |= {"strategy": name, "members": "groups" if name == method else "line"}
    block["tracking"] = {**block.get("tracking", {}), "directory": str(directory), "run_name": method, "mlflow": False}
    return {**base, "clantune": block}


def figures_in(output: str, names: Sequence[str]) -> dict[str, float]:
    """The last value of each named figure in a script's output.

    Raises:
        ClanError: if one is missing.
    """
    found = {}
    for name in names:
        values = re.findall(rf"^.*?{re.escape(name)} ([-+0-9.eE]+|nan|inf)\b", output, re.MULTILINE)
        if not values:
            raise ClanError(f"the script printed no line with {name!r} and a number. Its last lines:\n{output[-2000:]}")
        found[name] = float(values[-1])
    return found


def launch(script: Path, config: Path, num_ranks: int, seed: int, arguments: Sequence[str], log: Path) -> float:
    """Runs the script through the ``deepspeed`` launcher; returns its seconds.

    Raises:
        ClanError: if it fails, with the end of its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [
        str(launcher), "--num_accelerators", str(num_ranks), "--master_port", str(port),
        str(script), "--deepspeed", "--deepspeed_config", str(config), "--seed", str(seed), *arguments,
    ]  # fmt: skip
    environ = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
    start = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environ, check=False)
    if done.returncode:
        raise ClanError(f"{' '.join(command)} ended with code {done.returncode}:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - start


def table(outcomes: Sequence[Outcome], names: Sequence[str]) -> str:
    """Mean and range of each figure over the seeds, a row per method."""
    header = ["method", "seeds", *(f"{name}: mean (lowest to highest)" for name in names), "s per run"]
    rows = [header, ["---"] * len(header)]
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.method == method]
        cells = [method, ", ".join(str(outcome.seed) for outcome in own)]
        for name in names:
            values = [outcome.figures[name] for outcome in own]
            cells.append(f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        cells.append(f"{statistics.fmean(outcome.seconds for outcome in own):.0f}")
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Launches the runs and prints the table. If a launch fails, the results so far stay."""
    parser = argparse.ArgumentParser(
        prog="clantune_scale.bench.runs",
        description=__doc__.splitlines()[0] + " Arguments after -- are passed on to the script.",
    )
    parser.add_argument("script", type=Path, help="the training script")
    parser.add_argument("config", type=Path, help="its DeepSpeed config with the clantune block")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["fixed", "control", "clan"],
        help="strategies (clan-line: on the line), or fixed",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, help="ranks to launch; by default as many as the block has members")
    parser.add_argument(
        "--figures", nargs="+", default=["test loss"], help="names that the script prints before numbers"
    )
    parser.add_argument("--to", type=Path, default=Path("bench_runs"), help="folder for configs, outputs and results")
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    options, own = parser.parse_args(given[:split]), given[split + 1 :]
    base = json.loads(options.config.read_text())
    num_ranks = options.ranks or base["clantune"]["population_size"]
    outcomes: list[Outcome] = []
    for seed in options.seeds:
        for method in options.methods:
            folder = options.to.resolve() / f"{method}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            config = folder / "config.json"
            config.write_text(json.dumps(config_of(base, method, seed, folder), indent=1))
            log = folder / "output.txt"
            seconds = launch(options.script, config, num_ranks, seed, own, log)
            outcomes.append(Outcome(method, seed, figures_in(log.read_text(), options.figures), seconds))
            (options.to / "results.json").write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1))
            print(f"{method}, seed {seed}: {outcomes[-1].figures}, {seconds:.0f} s", flush=True)
    print(table(outcomes, options.figures))


if __name__ == "__main__":
    main()
