"""An unmodified DeepSpeed script, run as a clan."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from clantune_scale import run
from clantune_scale.errors import ConfigError
from clantune_scale.run import hold_out, main
from clantune_scale.tracking import read_events
from tests.backends.small_runs import ds_config
from tests.ranks import RankError, run_ranks
from tests.small_clans import clan_config

SCRIPT = """
import argparse, deepspeed
from tests.backends.small_runs import Net
from tests.small_clans import datasets, train

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
args = deepspeed.add_config_arguments(parser).parse_args()
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
model = Net()
engine, _, loader, _ = deepspeed.initialize(
    args=args, model=model, model_parameters=model.parameters(), training_data=datasets()[0]
)
train(engine, loader, 12)
"""


def _run_script(script, config):
    main(["--local_rank", os.environ["LOCAL_RANK"], str(script), "--deepspeed", "--deepspeed_config", str(config)])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("members", ["groups", "line"])
def test_an_unmodified_script_trains_as_a_clan_and_leaves_a_champion(members, tmp_path):
    script, config = tmp_path / "train.py", tmp_path / "ds.json"
    script.write_text(SCRIPT)
    block = {"fitness": {"num_samples": 16}, "members": members}
    config.write_text(json.dumps(clan_config(tmp_path / "runs", ds_config(1), **block)))
    run_ranks(2, _run_script, script, config)
    (run_dir,) = (tmp_path / "runs").iterdir()
    events = read_events(run_dir / "events.jsonl")
    assert [event["step"] for event in events if event["kind"] == "round_end"] == [5, 10]
    assert events[-1]["kind"] == "run_end" and events[-1]["status"] == "FINISHED"
    assert (run_dir / "champion.safetensors").exists()


def test_a_script_that_ends_without_a_clan_fails(tmp_path):
    script, config = tmp_path / "train.py", tmp_path / "ds.json"
    script.write_text("print('trained by other means')")
    config.write_text(json.dumps(clan_config(tmp_path / "runs", ds_config(1), members="line")))
    with pytest.raises(RankError, match="ended without an engine that has a clan"):
        run_ranks(1, _run_script, script, config)


def test_a_script_without_a_config_is_refused(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("")
    expected = re.escape("arguments ['--steps', '3'] name no DeepSpeed config")
    with pytest.raises(ValueError, match=expected):
        main([str(script), "--steps", "3"])


def test_held_out_examples_are_spread_over_the_data_and_not_trained_on():
    data = TensorDataset(torch.arange(100))
    train, validation = hold_out(data)
    assert [int(x) for (x,) in validation] == [19, 39, 59, 79, 99]
    assert sorted([int(x) for (x,) in train] + [int(x) for (x,) in validation]) == list(range(100))


def test_a_stream_cannot_be_held_out_of():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(1)

    with pytest.raises(ConfigError, match=r"a Stream without a length.*Name a validation set: --eval_data"):
        hold_out(Stream())


def test_a_failing_script_fails_the_run(tmp_path):
    script, config = tmp_path / "train.py", tmp_path / "ds.json"
    script.write_text("raise RuntimeError('of my own')")
    config.write_text(json.dumps(clan_config(tmp_path / "runs")))
    with pytest.raises(RankError, match="RuntimeError: of my own"):
        run_ranks(2, _run_script, script, config)


def test_training_data_may_be_passed_by_position(monkeypatch):
    calls = []

    def initialize(args=None, model=None, training_data=None, *, eval_data=None):
        calls.append((len(training_data), len(eval_data)))
        return ("engine",)

    monkeypatch.setattr("clantune_scale.backends.deepspeed.attach.initialize", initialize)
    engines = []
    run._replacement(None, engines)(None, "model", TensorDataset(torch.arange(100)))
    assert (calls, engines) == ([(95, 5)], ["engine"])
