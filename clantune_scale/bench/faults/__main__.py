"""``python -m clantune_scale.bench.faults``: injects faults and prints the results as a table.

Each section runs in its own processes, with gloo ranks on this machine. Every fault is real: a signal, a changed file,
a full file system or a non-finite number. The result is compared with an uninterrupted run: weights, optimizer states,
genomes, decisions, random streams and data order must be equal to the last bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from clantune_scale.bench.faults import results
from clantune_scale.bench.faults.sections import SECTIONS, parts, run_part
from clantune_scale.bench.faults.workload import FAMILIES


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 1 if any fault failed its check."""
    parser = argparse.ArgumentParser(prog="python -m clantune_scale.bench.faults", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--engine", nargs="+", help="names as in the table's second column (default: all)")
    parser.add_argument("--families", default=FAMILIES, help="package with the set-ups of the engines")
    parser.add_argument("--results", type=Path, help="file for the individual results; an existing file is extended")
    options = parser.parse_args(arguments)
    found = results.read(options.results) if options.results is not None and options.results.exists() else []
    wanted = [one for one in parts(options.only) if options.engine is None or one[1] in options.engine]
    began = time.monotonic()
    for number, (section, name) in enumerate(wanted, start=1):
        # A fork server can have one engine loaded, and Megatron's ranks are made without the others.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            progress = f"[{number}/{len(wanted)} {time.monotonic() - began:5.0f} s]"
            found += pool.submit(partial(run_part, section, name, options.families, progress)).result()
        if options.results is not None:
            results.write(options.results, found)
    print(f"\n{results.table(found)}\n\n{time.monotonic() - began:.0f} s.")
    wrong = [result for result in found if result.wrong]
    for result in wrong:
        print(result.line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
