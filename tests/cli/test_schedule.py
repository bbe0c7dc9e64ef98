"""``clantune schedule``: formats, stretching, and what DeepSpeed's own schedulers can say."""

from __future__ import annotations

import csv
import io

import pytest
import torch

from clantune_scale.core.schedule import ClanSchedule, Segment
from clantune_scale.results.schedule_formats import deepspeed_rate, to_deepspeed

LR = {"name": "lr", "target": "lr", "bounds": [0.1, 100], "relative": True}


def test_json_is_what_the_run_wrote_and_can_be_read_back(call, finished_run):
    said = call("schedule", finished_run.folder)
    assert said.code == 0
    assert said.out.strip() == (finished_run.folder / "schedule.json").read_text().strip()
    assert ClanSchedule.from_json(said.out).num_steps == 40
    assert call("schedule", finished_run.folder, "--json").data == said.data


def test_a_run_that_goes_on_has_the_schedule_so_far(call, finished_run):
    whole, half = (ClanSchedule.from_json(call("schedule", f).out) for f in (finished_run.folder, finished_run.half))
    assert 0 < half.num_steps < whole.num_steps


def test_another_member_has_another_ancestry_or_the_same(call, finished_run):
    assert call("schedule", finished_run.folder, "--member", 1).code == 0
    said = call("schedule", finished_run.folder, "--member", 7)
    assert said.code == 2 and "there is no member 7 in a clan of 2" in said.err


def test_csv_has_a_row_per_stretch(call, finished_run):
    schedule = ClanSchedule.from_json(call("schedule", finished_run.folder).out)
    rows = list(csv.DictReader(io.StringIO(call("schedule", finished_run.folder, "--format", "csv").out)))
    assert len(rows) == len(schedule.segments)
    for row, segment in zip(rows, schedule.segments, strict=True):
        assert int(row["start_step"]) == segment.start_step and float(row["lr"]) == segment.values["lr"]
        assert float(row["lr_factor_end"]) == segment.lr_factor[1] and row["undone"] == str(segment.undone)


def test_stretched_by_steps_and_batch(call, finished_run):
    options = ("--steps", 400, "--batch", 32, "--rate-rule", "sqrt")  # the run's batch is 8
    schedule = ClanSchedule.from_json(call("schedule", finished_run.folder, *options).out)
    found = ClanSchedule.from_json(call("schedule", finished_run.folder).out)
    assert schedule.num_steps == 400
    assert schedule.value_at("lr", 123) == found.value_at("lr", 12)
    assert schedule.rate_factor == pytest.approx(2.0) and schedule.lr_factor_at(0) == 1.0
    (row, *_) = csv.DictReader(io.StringIO(call("schedule", finished_run.folder, *options, "--format", "csv").out))
    assert float(row["lr_factor_start"]) == pytest.approx(2.0)
    unchanged = ClanSchedule.from_json(call("schedule", finished_run.folder, "--batch", 32).out)
    assert unchanged == found


def test_a_rule_without_a_batch_and_a_batch_of_nothing_are_refused(call, finished_run):
    said = call("schedule", finished_run.folder, "--rate-rule", "sqrt")
    assert said.code == 2 and "Add --batch N" in said.err
    said = call("schedule", finished_run.folder, "--batch", 0)
    assert said.code == 2 and "to 0 samples" in said.err


def test_a_deepspeed_fragment_says_what_is_lost(call, finished_run):
    said = call("schedule", finished_run.folder, "--format", "deepspeed", "--json")
    assert said.data["config"]["scheduler"]["type"] == "WarmupDecayLR"
    assert said.data["config"]["scheduler"]["params"]["total_num_steps"] == 40
    assert any("beta1, dropout: DeepSpeed has no scheduler" in lost for lost in said.data["lost"])
    text = call("schedule", finished_run.folder, "--format", "deepspeed").out
    assert '"WarmupDecayLR"' in text and "// lost: " in text


def _deepspeed_rates(fragment, num_steps: int) -> list[float]:
    from deepspeed.runtime import lr_schedules

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    block = fragment.config["scheduler"]
    scheduler = getattr(lr_schedules, block["type"])(optimizer, **block["params"])
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


@pytest.mark.parametrize("decays", [True, False])
def test_the_fragment_gives_the_rates_that_it_claims_in_deepspeed(decays):
    last = Segment(20, 40, {"lr": 4.0}, (1.0, 0.0 if decays else 1.0))
    schedule = ClanSchedule((LR,), (Segment(0, 10, {"lr": 1.0}), Segment(10, 20, {"lr": 2.0}), last))
    fragment = to_deepspeed(schedule, base_lr=0.1)
    rates = _deepspeed_rates(fragment, 40)
    params = fragment.config["scheduler"]["params"]
    assert rates == pytest.approx([deepspeed_rate(params, step) for step in range(40)])
    wanted = [0.1 * schedule.value_at("lr", s) * schedule.lr_factor_at(s) for s in range(40)]
    floor = max(wanted) / 100
    kept = [(a, max(b, floor)) for a, b in zip(wanted[3:], rates[3:], strict=True) if a > floor]
    ratios = [max(a / b, b / a) for a, b in kept]
    assert fragment.worst_rate_ratio == pytest.approx(max(ratios))
    assert "off by a factor of up to" in fragment.lost[0]


def test_a_schedule_that_a_straight_line_is_loses_nothing():
    schedule = ClanSchedule((LR,), (Segment(0, 20, {"lr": 2.0}), Segment(20, 4000, {"lr": 2.0}, (1.0, 0.0))))
    fragment = to_deepspeed(schedule, base_lr=0.1)
    assert fragment.lost == () and fragment.worst_rate_ratio < 1.05


def test_the_factor_for_another_batch_is_in_the_fragments_rates():
    schedule = ClanSchedule((LR,), (Segment(0, 20, {"lr": 2.0}), Segment(20, 4000, {"lr": 2.0}, (1.0, 0.0))), 4.0)
    params = to_deepspeed(schedule, base_lr=0.1).config["scheduler"]["params"]
    assert params["warmup_max_lr"] == pytest.approx(0.1 * 2.0 * 4.0)


def test_a_schedule_beside_the_users_own_is_not_deepspeeds_to_say():
    fragment = to_deepspeed(ClanSchedule((LR,), (Segment(0, 20, {"lr": 2.0}),)), base_lr=None)
    assert fragment.config == {} and "ClanScheduleLR(own=...)" in fragment.lost[0]
