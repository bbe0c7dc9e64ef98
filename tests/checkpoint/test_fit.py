"""What does not fit is refused with the difference, unless it is allowed by name; another population goes on."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from clantune_scale.checkpoint import fit, manifest
from clantune_scale.checkpoint.fit import check_settings, layout_difference
from clantune_scale.config.deepspeed_file import extract
from clantune_scale.config.schema import ClanConfig, Difference
from clantune_scale.errors import CheckpointError
from clantune_scale.tracking import read_events
from clantune_scale.tracking.history import lineage_from_events, schedule_from_events
from clantune_scale.tracking.report import write_report
from tests.backends.small_runs import SGD, ds_config, in_member_worlds
from tests.checkpoint.runs import launch, named, resumed
from tests.ranks import run_ranks
from tests.small_clans import clan_config

SAVED = {"population_size": 4, "round_length": 20, "batch": {"clan_batch": 8}, "optimizer": "AdamW", "seed": 0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"round_length": 30}, r"round_length: 20 was saved, this launch has 30"),
        ({"optimizer": "SGD"}, r"optimizer: 'AdamW' was saved, this launch has 'SGD'"),
        ({"batch": {"clan_batch": 9}}, r"batch: clan_batch 8 was saved, this launch has 9"),
        ({"new": 1}, r"new: None was saved, this launch has 1"),
    ],
)
def test_a_difference_is_printed_and_can_be_allowed(change, said):
    (name,) = change
    with pytest.raises(CheckpointError, match=said) as caught:
        check_settings(SAVED, SAVED | change, [])
    assert f"clantune.checkpoint.allow: ['{name}']" in str(caught.value)
    check_settings(SAVED, SAVED | change, [name])
    check_settings(SAVED, SAVED, [])


def test_another_population_divides_the_batch_otherwise():
    live = SAVED | {"population_size": 2, "batch": {"clan_batch": 4}}
    check_settings(SAVED, live, ["population_size"])
    with pytest.raises(CheckpointError, match=r"population_size: 4 was saved(.|\n)*batch"):
        check_settings(SAVED, live, [])


def test_layouts_are_compared_by_name():
    saved = [["a", [2, 3], "torch.float32"], ["b", [4], "torch.float32"]]
    assert layout_difference(saved, saved) is None
    assert layout_difference(saved, saved[:1]) == "b: [[4], 'torch.float32'] was saved, this launch has nothing"
    assert layout_difference(saved, [["a", [2, 4], "torch.float32"], saved[1]]).startswith("a: [[2, 3]")


def _refusals(rank, config, others):
    stopped = launch(named(config, "stopped"), 7, ends="stop", dropout=0.0)
    said = []
    for other in others:
        try:
            launch(resumed(other, stopped.run_dir), 9, dropout=0.0)
        except CheckpointError as error:
            said.append(str(error))
    # After all refusals the run goes on all the same.
    launch(resumed(config, stopped.run_dir), 9, dropout=0.0)
    return said


def test_a_run_is_refused_under_other_settings(tmp_path):
    def config(base, **block):
        return clan_config(tmp_path, base, strategy="classic", total_steps=40, **block)

    others = [
        config(ds_config(0) | {"optimizer": SGD}),
        config(ds_config(0), genes=["lr", "beta1"]),
        config(ds_config(0) | {"optimizer": SGD}, checkpoint={"allow": ["optimizer"]}),
    ]
    for said in run_ranks(2, in_member_worlds, _refusals, config(ds_config(0)), others):
        optimizer, genes, state = said
        assert "optimizer: 'AdamW' was saved, this launch has 'SGD'" in optimizer
        assert "genes: " in genes and "'beta1'" in genes and genes.endswith("name the run's genes in clantune.genes.")
        assert "clantune.genes" not in optimizer
        assert "state does not fit" in state and "optimizer.0.exp_avg" in state


def _stop(rank, config, num_steps, ends):
    return launch(config, num_steps, ends=ends, dropout=0.0)


@pytest.mark.parametrize(
    ("before", "after", "strategy"),
    [
        (3, 2, "classic"),
        pytest.param(2, 4, "clan", marks=pytest.mark.slow),
        pytest.param(4, 3, "hdet", marks=pytest.mark.slow),
    ],
)
def test_another_number_of_members_goes_on(before, after, strategy, tmp_path):
    def config(size):
        block = {
            "strategy": strategy,
            "genes": ["lr"],  # by default four members, whose batch sees samples twice, have others than two
            "total_steps": 60,
            "population_size": size,
            "checkpoint": {"allow": ["population_size"], "asynchronous": False},
        }
        return clan_config(tmp_path, ds_config(1), **block)

    first = run_ranks(before, in_member_worlds, _stop, named(config(before), "resized"), 12, "leave")
    run_dir = Path(first[0].run_dir)
    losses = manifest.read(run_dir / "rounds" / "round-000001")["losses"]
    ranking = sorted(range(before), key=lambda member: losses[member])
    sources = sorted(ranking[:after]) if after < before else [*range(before), *ranking[: after - before]]
    results = run_ranks(after, in_member_worlds, _stop, resumed(config(after), run_dir), 23, "finish")
    assert len({repr(result.exact["lineage"]) for result in results}) == 1
    events = read_events(run_dir / "events.jsonl")
    (resume,) = [event for event in events if event["kind"] == "resume"]
    assert (resume["step"], resume["sources"]) == (10, sources)
    sizes = [len(event["members"]) for event in events if event["kind"] == "round_end"]
    assert sizes[:2] == [before, before] and set(sizes[2:]) == {after} and len(sizes) >= 4
    # Whoever reads the run afterwards follows a member across the change.
    lineage = lineage_from_events(events)
    assert lineage.resizes == {2: tuple(sources)}
    # -1 stands for a round after which all were averaged, as hdet does.
    assert all(-1 <= held < before for held in lineage.ancestry(after - 1)[:2])
    assert schedule_from_events(events).segments[-1].end_step == 20
    write_report(run_dir)


def test_every_setting_has_a_name_that_can_be_allowed():
    named = set(get_args(Difference)) - {"topology", "batch", "optimizer", "parameters", "nonfinite_mask"}
    assert named == set(ClanConfig.model_fields) - set(fit._WITHOUT_EFFECT)
    with pytest.raises(ValueError, match="checkpoint.allow"):
        ClanConfig(population_size=2, checkpoint={"allow": ["populaton_size"]})


def test_the_word_for_the_last_run_passes_the_blocks_rules():
    """A word of another tool's own ("auto") would be refused before anyone looked for the run."""
    block = {"population_size": 2, "tracking": {"run_name": "mine"}, "checkpoint": {"resume": "latest"}}
    assert extract({"train_batch_size": 8, "clantune": block})[1].checkpoint.resume == "latest"
