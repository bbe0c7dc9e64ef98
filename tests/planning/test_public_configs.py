"""Public DeepSpeed files through ``clantune validate``: batch arithmetic, errors and warnings of each."""

from __future__ import annotations

import copy
import json

import pytest

from tests.cli.calls import call
from tests.planning.public_configs import CASES, Case

__all__ = ["call"]


def _write(case: Case, folder) -> str:
    block = {"population_size": case.population_size, "total_steps": 1000}
    path = folder / "ds.json"
    path.write_text(json.dumps({**case.config, "clantune": block}))
    return str(path)


def _ids(case: Case) -> str:
    return case.source.replace(" ", ":")


def _same(said: list[str], wanted: tuple[str, ...]) -> None:
    """Each sentence has one of the parts, and no part is without its sentence."""
    assert len(said) == len(wanted), said
    for part in wanted:
        assert any(part in one for one in said), (part, said)


@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_each_public_file_gets_the_right_answer(case, call, tmp_path):
    said = call("validate", _write(case, tmp_path), "--world-size", case.world_size, *case.options, "--json")
    data = said.data
    assert (said.code, data["valid"]) == ((1, False) if case.errors else (0, True))
    _same(data["errors"], case.errors)
    _same(data["warnings"], case.warnings)
    batch = data["batch"]
    found = batch and tuple(batch[key] for key in ("member_batch", "micro_batch", "accumulation", "dp_size"))
    assert found == case.batch
    if batch and "train_batch_size" in case.config:
        assert batch["clan_batch"] * batch["counted"] == case.config["train_batch_size"]


def test_there_are_thirty_files_from_several_places():
    files = [case.source for case in CASES if not case.source.startswith("...")]
    assert len(set(files)) >= 30 and len({source.split()[0] for source in files}) >= 8


def test_what_deepspeed_itself_raises_on_is_an_error():
    from deepspeed.runtime.config import DeepSpeedConfig

    for case in CASES:
        try:
            DeepSpeedConfig(copy.deepcopy(case.config))
        # A batch that one rank cannot have is an AssertionError of its last check.
        except Exception as error:
            assert case.errors or "train_batch_size is not equal" in str(error), (case.source, error)


def test_a_plan_of_bloom_counts_one_part_of_a_member(call, tmp_path):
    (case,) = [case for case in CASES if case.options]
    command = ("plan", _write(case, tmp_path), "--params", "176e9", "--world-size", case.world_size, *case.options)
    data = call(*command, "--json").data
    # 48 parts of bf16 weights, and 12 bytes of fp32 masters and moments for each.
    assert data["memory"]["clan"]["weights"] == pytest.approx(176e9 / 48 * 2, rel=1e-6)
    assert data["memory"]["clan"]["moments"] == pytest.approx(176e9 / 48 * 8, rel=1e-6)
    assert (data["parameters"], data["num_parts"]) == (176_000_000_000, 48)
    assert "pp 12 x tp 4" in data["ranks"] and any("one of the 48" in text for text in data["warnings"])
    # 8 ranks hold the same part, one of each member: a ring all-reduce of the gradients crosses between members.
    assert data["traffic"]["plain_step"]["inside_bytes"] == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--tensor-parallel-size", 0), 2, "--tensor-parallel-size is 0"),
        (("--pipeline-parallel-size", 3), 1, "does not divide the 8 ranks"),
        (("--pipeline-parallel-size", 2), 1, "pipeline engine takes only 0 and 1"),
        (("--tensor-parallel-size", 2), 1, "says 2, and tensor_parallel.autotp_size is 4"),
    ],
)
def test_degrees_that_do_not_fit_are_errors(options, code, message, call, tmp_path):
    path = tmp_path / "ds.json"
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "clantune": {"population_size": 2},
    }
    path.write_text(json.dumps(config | {"tensor_parallel": {"autotp_size": 4}} if "tensor" in options[0] else config))
    said = call("validate", path, "--world-size", 8, *options)
    assert said.code == code and message in said.out + said.err
