"""The picture: every member and gene is on it."""

from __future__ import annotations

import pytest

from clantune_scale.config.schema import ClanConfig
from clantune_scale.errors import ClanError
from clantune_scale.tracking import plots
from clantune_scale.tracking.events import to_plain
from tests.tracking import sample_run

CONFIG = ClanConfig(population_size=2, genes=["lr", "dropout"])


def events(rounds):
    yield {"kind": "run_start", "step": 0, **to_plain(sample_run.start(CONFIG))}
    for index in range(rounds):
        yield {"kind": "round_end", "step": 10 * (index + 1), **to_plain(sample_run.round_end(CONFIG, index))}


def test_a_png_is_written(tmp_path):
    path = plots.plot_genes(list(events(3)), tmp_path / "genes.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_members_genes_and_competition_are_drawn(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    plots.plot_genes(list(events(3)), tmp_path / "genes.png")
    fitness, rate, lr, dropout = drawn[0].axes
    assert [line.get_label() for line in fitness.lines] == ["member 0", "member 1"]
    assert list(fitness.lines[1].get_ydata()) == pytest.approx([3.1, 2.1, 1.1])
    assert list(rate.lines[1].get_ydata()) == [2e-3] * 3
    # Both members' genes and the clan's, each value from its round's start to its end.
    assert [list(line.get_xdata()) for line in lr.lines] == [[0, 10, 10, 20, 20, 30]] * 3
    assert (lr.get_ylabel(), lr.get_yscale()) == ("lr (factor)", "log")
    assert (dropout.get_ylabel(), dropout.get_yscale()) == ("dropout", "linear")
    # One shaded span per round and panel: steps 8 to 10, 18 to 20, 28 to 30.
    assert [(patch.get_x(), patch.get_width()) for patch in lr.patches] == [(8, 2), (18, 2), (28, 2)]


def test_colors_do_not_repeat_without_another_style():
    looks = {(look["color"], look["linestyle"]) for look in map(plots._look, range(16))}
    assert len(looks) == 16


def test_no_round_no_picture(tmp_path):
    with pytest.raises(ClanError, match="no round is finished"):
        plots.plot_genes(list(events(0)), tmp_path / "genes.png")
