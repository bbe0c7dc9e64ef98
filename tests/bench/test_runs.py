import json

import pytest

from clantune_scale.bench import runs
from clantune_scale.errors import ClanError

SCRIPT = """
import argparse, json
parser = argparse.ArgumentParser()
parser.add_argument("--deepspeed", action="store_true")
for name in ("--deepspeed_config", "--seed", "--local_rank", "--steps"):
    parser.add_argument(name)
options = parser.parse_args()
block = json.load(open(options.deepspeed_config))["clantune"]
assert block["seed"] == int(options.seed) and options.steps == "7"
print("test loss 9.0 before training")
if options.local_rank == "0":
    value = {"fixed": 3.0, "control": 2.0}[block.get("strategy", "fixed")] + int(options.seed)
    print(f"test loss {value:.4f} nats per byte")
    raise SystemExit(int(options.seed) == 13)
"""


def _options(tmp_path, *rest):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "ds.json").write_text(json.dumps({"clantune": {"population_size": 1}}))
    paths = [str(tmp_path / "train.py"), str(tmp_path / "ds.json"), "--to", str(tmp_path / "to")]
    return [*paths, "--methods", "fixed", "control", *rest, "--", "--steps", "7"]


@pytest.mark.slow
def test_every_method_and_seed_is_launched_and_tabled(tmp_path, capsys):
    runs.main(_options(tmp_path, "--seeds", "0", "2"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("| fixed | 0, 2 | 4.0000 (3.0000 to 5.0000) |")
    assert lines[-1].startswith("| control | 0, 2 | 3.0000 (2.0000 to 4.0000) |")
    kept = json.loads((tmp_path / "to" / "results.json").read_text())
    assert [(r["method"], r["seed"]) for r in kept] == [("fixed", 0), ("control", 0), ("fixed", 2), ("control", 2)]


@pytest.mark.slow
def test_a_launch_that_fails_says_how(tmp_path):
    with pytest.raises(ClanError, match=r"ended with code 1:(.|\n)*test loss 16"):
        runs.main(_options(tmp_path, "--seeds", "13"))


def test_a_figure_that_was_not_printed_is_an_error():
    assert runs.figures_in("x: test loss 2.0\ntest loss 1.5 nats\n", ["test loss"]) == {"test loss": 1.5}
    with pytest.raises(ClanError, match="no line with 'validation loss' and a number"):
        runs.figures_in("test loss 1.5\n", ["validation loss"])


def test_a_fixed_run_is_the_same_config_without_a_clan(tmp_path):
    base = {"train_batch_size": 8, "clantune": {"population_size": 4, "strategy": "pbt"}}
    fixed = runs.config_of(base, "fixed", 3, tmp_path)
    assert fixed["clantune"]["enabled"] is False and fixed["train_batch_size"] == 8
    clan = runs.config_of(base, "clan", 3, tmp_path)
    assert clan["clantune"]["strategy"] == "clan" and clan["clantune"]["seed"] == 3 and clan["clantune"]["enabled"]
    line = runs.config_of(base, "clan-line", 3, tmp_path)
    assert clan["clantune"]["members"] == "groups"
    assert line["clantune"]["strategy"] == "clan" and line["clantune"]["members"] == "line"
