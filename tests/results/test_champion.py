"""The champion in every form: written by real engines, and read by those who know nothing of a clan."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load

from clantune_scale.errors import ClanError
from clantune_scale.results import weight_files
from tests.backends.families import pipeline
from tests.backends.small_runs import Net, ds_config, flat_weights, in_member_worlds, plain_engine, train_step
from tests.ranks import RankError, run_ranks
from tests.small_clans import clan_config, start, train

FORMS = ["safetensors", "dcp", "deepspeed"]
LATER = (100, 101)


def _train_and_finish(rank: int, config: dict) -> dict[str, Any]:
    engine, loader = start(config)
    train(engine, loader, 7)
    clan = engine.clan
    on_the_way = clan.save_champion()
    between = flat_weights(engine)
    best = int(clan.fitness.mean.argmin())
    train(engine, loader, 10)
    summary = clan.finish()
    result = {"best": best, "on_the_way": str(on_the_way), "between": between, "summary": summary}
    result |= {"member": clan.member, "weights": flat_weights(engine)}
    # It goes on as plain DeepSpeed: what a run without a clan has to repeat from the checkpoint.
    for step in LATER:
        train_step(engine, step, clan.world.at.member_rank)
    return result | {"later": flat_weights(engine)}


def _go_on_plainly(rank: int, config: dict, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    engine = plain_engine(config)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    loaded = flat_weights(engine)
    for step in LATER:
        train_step(engine, step, rank)
    return loaded, flat_weights(engine)


def _in_order(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].float().flatten() for name, _ in Net().named_parameters()])


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.slow)])
def test_every_form_holds_the_champion_and_plain_deepspeed_goes_on_from_its_checkpoint(stage, tmp_path):
    # A model of 4,832 bytes in files of 2,000.
    checkpoint = {"champion": FORMS, "champion_file_bytes": 2000}
    config = clan_config(tmp_path, ds_config(stage, clip=0.5), checkpoint=checkpoint, strategy="pbt")
    results = run_ranks(4, in_member_worlds, _train_and_finish, config)
    summary = results[0]["summary"]
    champion = next(result for result in results if result["member"] == summary.champion)
    folder = summary.run_dir
    files = weight_files.find(folder, "champion")
    assert len(files.files) == 3 and summary.artifacts["champion"] == str(files.main)
    assert all(result["summary"].artifacts == summary.artifacts for result in results)
    assert torch.equal(_in_order(weight_files.read(files)[0]), champion["weights"])
    assert torch.equal(_in_order(_load_dcp(folder / "champion_dcp")), champion["weights"])
    plain = run_ranks(2, in_member_worlds, _go_on_plainly, ds_config(stage, clip=0.5), f"{folder}/champion_deepspeed")
    for loaded, later in plain:
        assert torch.equal(loaded, champion["weights"]) and torch.equal(later, champion["later"])
    _on_the_way(results)
    assert not list(folder.glob("**/*.part*"))


def _on_the_way(results: list[dict[str, Any]]) -> None:
    """What was saved at step 7 is the best member of that time, and the run went on."""
    best = next(result for result in results if result["member"] == result["best"])
    folder = Path(best["on_the_way"])
    assert folder.name == "champion-step-00000007"
    tensors, _ = weight_files.read(weight_files.find(folder, "champion"))
    assert torch.equal(_in_order(tensors), best["between"]) and not torch.equal(best["between"], best["weights"])
    assert torch.equal(_in_order(_load_dcp(folder / "champion_dcp")), best["between"])
    assert (folder / "champion_deepspeed" / "latest").read_text() == "champion"


def _load_dcp(folder: Path) -> dict[str, torch.Tensor]:
    """As one process does it that has torch alone."""
    return _filled({name: torch.full_like(tensor, torch.nan) for name, tensor in Net().state_dict().items()}, folder)


def _filled(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        load(tensors, checkpoint_id=folder)
    return tensors


def _save_where_it_cannot_be(rank: int, config: dict, blocked: str) -> tuple[str, int]:
    engine, loader = start(config)
    train(engine, loader, 2)
    with pytest.raises(ClanError) as raised:
        engine.clan.save_champion(Path(blocked) / "champion")
    train(engine, loader, 4)
    engine.clan.finish()
    return str(raised.value), engine.global_steps


def test_all_ranks_are_told_when_the_weights_could_not_be_written_and_may_go_on(tmp_path):
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    config = clan_config(tmp_path / "runs", ds_config(0), checkpoint={"champion": True})
    for message, steps in run_ranks(2, in_member_worlds, _save_where_it_cannot_be, config, str(blocked)):
        assert "weights could not be written to" in message and "NotADirectoryError" in message and steps == 4


def _start_with_a_foreign_form(rank: int, config: dict) -> None:
    from clantune_scale.backends.deepspeed import DeepSpeedBackend

    del DeepSpeedBackend.save_checkpoint
    start(config)


def test_a_form_that_the_engine_does_not_have_is_refused_at_the_start(tmp_path):
    config = clan_config(tmp_path, ds_config(0), checkpoint={"champion": ["deepspeed"]}, population_size=1)
    with pytest.raises(RankError, match="ConfigError: checkpoint.champion lists 'deepspeed', and the engine is"):
        run_ranks(1, _start_with_a_foreign_form, 0, config)


def _finish_a_pipeline(block: dict) -> dict[str, Any]:
    run = pipeline.start(pipeline.CASES["1-tied"], block)
    run.train(6)
    weights = run.weights()
    summary = run.clan.finish()
    result = {"member": run.clan.member, "summary": summary, "weights": weights}
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return result


@pytest.mark.slow
def test_each_stage_of_a_pipeline_writes_its_own_file(tmp_path):
    block = clan_config(tmp_path, {}, checkpoint={"champion": FORMS})["clantune"]
    results = run_ranks(4, _finish_a_pipeline, block)
    summary = results[0]["summary"]
    weights = next(result["weights"] for result in results if result["member"] == summary.champion)
    files = weight_files.find(summary.run_dir, "champion")
    assert [file.name for file in files.files] == [f"champion-0000{stage}-of-00002.safetensors" for stage in (1, 2)]
    assert files.index is not None and summary.artifacts["champion"] == str(files.index)
    tensors, _ = weight_files.read(files)
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[name], weights[name]) for name in weights)
    empty = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    loaded = _filled(empty, summary.run_dir / "champion_dcp")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert (summary.run_dir / "champion_deepspeed" / "champion").is_dir()
