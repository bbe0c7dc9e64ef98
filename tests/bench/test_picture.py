import math

import pytest

from clantune_scale.bench import picture
from clantune_scale.config.schema import ClanConfig
from clantune_scale.errors import ClanError
from clantune_scale.tracking.events import EventLog
from tests.tracking import sample_run

CONFIG = ClanConfig(population_size=2, genes=["lr"])


def _run(folder, *, num_rounds):
    folder.mkdir()
    log = EventLog(folder / "events.jsonl")
    log.append("run_start", 0, sample_run.start(CONFIG))
    for index in range(num_rounds):
        log.append("round_end", 10 * (index + 1), sample_run.round_end(CONFIG, index))
    log.close()
    return folder


def _round(step, losses, rates):
    return {
        "kind": "round_end",
        "step": step,
        "members": [{"loss": loss} for loss in losses],
        "learning_rates": rates,
    }


def test_a_curve_follows_the_best_member():
    events = [
        {"kind": "step", "step": 5},
        _round(10, [3.0, 2.5], [0.1, 0.2]),
        _round(20, [math.nan, math.inf], [0.1, 0.2]),
        _round(30, [2.0, math.nan], [0.3, 0.4]),
    ]
    assert picture.curve_of(events) == picture.Curve(steps=(10, 30), losses=(2.5, 2.0), learning_rates=(0.2, 0.3))


def test_a_run_without_a_finite_loss_is_an_error():
    with pytest.raises(ClanError, match="no round of the run has a finite validation loss"):
        picture.curve_of([_round(10, [math.nan], [0.1])])


def test_every_run_is_a_line_in_both_panels(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig

    def keep(figure, *args, **options):
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    runs = [f"{name}={_run(tmp_path / name, num_rounds=count)}" for name, count in (("plain", 2), ("clan", 3))]
    picture.main([*runs, "--to", str(tmp_path / "runs.png")])
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    loss, rate = drawn[0].axes
    assert [line.get_label() for line in loss.lines] == ["plain", "clan"]
    assert list(loss.lines[1].get_xdata()) == [10, 20, 30]
    assert list(loss.lines[1].get_ydata()) == [3.0, 2.0, 1.0]
    assert len(rate.lines) == 2 and rate.get_yscale() == "log"


@pytest.mark.parametrize("entry", ["clan", "clan=nowhere"])
def test_what_is_no_run_is_named(entry, capsys):
    with pytest.raises(SystemExit):
        picture.main([entry])
    assert (entry.partition("=")[2] or entry) in capsys.readouterr().err
