"""The lines that a user reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from clantune_scale.config.schema import ClanConfig
from clantune_scale.tracking.events import to_plain
from clantune_scale.tracking.live import Lines
from clantune_scale.tracking.terminal import Terminal
from tests.tracking import sample_run

CONFIG = ClanConfig(population_size=2, genes=["lr", "dropout"])


@pytest.fixture
def shown():
    lines = []
    on = Lines()
    on.line = lines.append
    terminal = Terminal(events_path=Path("run/events.jsonl"), mlflow_hint="mlflow ui", on=on)

    def show(kind, step, **fields):
        terminal.show({"kind": kind, "step": step, "time_s": float(step), **to_plain(fields)})
        return lines

    return show


def test_start_names_clan_genes_and_batch(shown):
    text = "\n".join(shown("run_start", 0, **sample_run.start(CONFIG)))
    assert "2 members x 2 ranks, strategy clan, genes lr, dropout" in text
    assert "batch 32 = 2 members x 16 (micro-batch 8 x accumulation 1 x dp 2)" in text


def test_a_step_is_one_line(shown):
    (line,) = shown("step", 40, round=1, phase="cooperative", loss=2.5, step_s=0.25, samples=1)
    assert line.split() == ["step", "40", "round", "1", "cooperative", "loss", "2.5000", "0.250", "s/step"]


def test_a_round_is_one_aligned_table(shown):
    title, header, *rows = shown("round_end", 10, **sample_run.round_end(CONFIG, 0))
    assert "round 0: steps 0 to 10" in title and "evaluation 0.2" in title
    assert header.split() == ["member", "loss", "±", "se", "lr", "dropout", "learning", "rate", "parent", "reason"]
    assert rows[0].split() == ["0", "3.0000", "0.0100", "1", "0.1", "0.001", "-", "best"]
    assert rows[1].split() == ["1", "3.1000", "0.0100", "1", "0.1", "0.002", "0", "clone", "of", "0"]
    assert {row.index("best" if "best" in row else "clone") for row in rows} == {header.index("reason")}


def test_members_that_do_not_differ_are_one_row(shown):
    fields = sample_run.round_end(CONFIG, 0)
    fields["members"][1] = fields["members"][0] | {"member": 1, "donor": 1}
    fields["learning_rates"] = [1e-3, 1e-3]
    _, _, *rows = shown("round_end", 10, **fields)
    assert [row.split()[:2] for row in rows] == [["all", "3.0000"]]


def test_a_member_that_diverged_is_shown(shown):
    fields = sample_run.round_end(CONFIG, 0)
    fields["members"][1] |= {"loss": float("inf"), "standard_error": float("nan")}
    assert shown("round_end", 10, **fields)[-1].split()[1:3] == ["inf", "nan"]


def test_the_end_says_where_everything_is(shown):
    artifacts = {"champion": "run/champion.safetensors"}
    lines = shown("run_end", 20, status="FINISHED", champion=1, champion_loss=1.25, artifacts=artifacts)
    assert lines[0] == "clan FINISHED after 20 steps: the champion is member 1, loss 1.2500"
    assert [line.split()[:2] for line in lines[1:]] == [
        ["champion", "run/champion.safetensors"],
        ["events", "run/events.jsonl"],
        ["mlflow", "mlflow"],
    ]


def test_warnings_are_logged_and_other_kinds_are_not_shown(shown, caplog):
    assert shown("phase_start", 1, round=0, phase="competitive", num_steps=2) == []
    assert shown("warning", 1, message="careful") == [] and caplog.messages == ["clan warning: careful"]
