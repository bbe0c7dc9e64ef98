"""The report and MLflow's own pages in a real browser: what only a browser can say about them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from clantune_scale.tracking.mlflow import upload
from clantune_scale.tracking.report import write_report
from tests.browser import browser
from tests.tracking import simulated_run
from tests.tracking.mlflow_server import mlflow_server

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Address of the report of a run with everything in it: restored rounds, many members, long names."""
    run_dir = simulated_run.write(tmp_path_factory.mktemp("report"), num_rounds=30, num_members=6, frozen_after=24)
    return write_report(run_dir).as_uri()


# Boxes of all letters in the drawings, in CSS pixels: their height is what the eye gets.
LETTERS = """
return [...document.querySelectorAll('svg text')].map(t =>
    parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b))
"""


@pytest.mark.parametrize("width", [360, 1280])
def test_the_report_fits_its_window_and_can_be_read(report, tmp_path, width):
    with browser(tmp_path / "profile", width=width, height=800) as window:
        window.open(report)
        assert window.run("return document.documentElement.scrollWidth") <= width
        letters = window.run(LETTERS)
        # 9 CSS pixels are the height of the small print that telephones' own pages have.
        assert len(letters) > 100 and min(letters) >= 9
        text = window.run(
            "return [...document.querySelectorAll('p, li, td, th, figcaption, h1, h2, h3')].map(e => "
            "parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(text) >= 14
        sizes = window.run(
            "return [...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().width)"
        )
        assert len(sizes) == 9 and min(sizes) > 0.35 * width


def test_letters_in_the_drawings_do_not_lie_on_each_other(report, tmp_path):
    """Of ticks, labels and legends of one drawing no two cover each other by more than a sliver."""
    script = """
    return [...document.querySelectorAll('figure')].flatMap(f => {
        const boxes = [...f.querySelectorAll('svg text')].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
        return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
            Math.min(p.right, q.right) - Math.max(p.left, q.left) > 3 &&
            Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 5).map(([b, q]) => f.id + ': ' + a + ' / ' + b));
    })"""
    with browser(tmp_path / "profile", width=1280, height=800) as window:
        window.open(report)
        assert window.run(script) == []


def test_the_report_loads_nothing(report, tmp_path):
    with browser(tmp_path / "profile", width=1280, height=800) as window:
        window.open(report)
        assert window.run("return performance.getEntriesByType('resource').length") == 0


def test_the_report_prints(report, tmp_path):
    with browser(tmp_path / "profile", width=1280, height=800) as window:
        window.open(report)
        printed = window.pdf()
    assert printed.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 8


@pytest.fixture(scope="module")
def ui(tmp_path_factory):
    """MLflow's own pages of an uploaded run: address, experiment, run."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("ui")
    run_dir = simulated_run.write(folder / "run", num_rounds=6, num_members=4)
    end = {"status": "FINISHED", "champion": 0, "champion_loss": 2.0, "artifacts": {}}
    with open(run_dir / "events.jsonl", "a") as file:
        file.write(
            json.dumps({"schema": 1, "kind": "run_end", "time_s": simulated_run.BEGAN_S + 130, "step": 120, **end})
            + "\n"
        )
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    parent = upload(run_dir, uri=uri)
    experiment = MlflowClient(tracking_uri=uri).get_run(parent).info.experiment_id
    with mlflow_server(folder, uri=uri) as address:
        yield address, experiment, parent


def keep(window, name, tmp_path):
    """Screenshots stay in pytest's folder, to be looked at."""
    window.screenshot(tmp_path / name)
    shutil.copy(tmp_path / name, Path(tmp_path).parent / name)


def test_members_nest_under_the_clan_in_mlflow(ui, tmp_path):
    address, experiment, _ = ui
    with browser(tmp_path / "profile", width=1400, height=900) as window:
        window.open(f"{address}/#/experiments/{experiment}/runs")
        window.wait("return document.body.innerText.includes('simulated')")
        keep(window, "mlflow-runs.png", tmp_path)
        assert "simulated/member-3" not in window.run("return document.body.innerText")
        # The plus before the clan's run opens its members.
        window.wait("return document.querySelector('.ag-cell button') !== null")
        window.run("document.querySelector('.ag-cell button').click()")
        window.wait("return document.body.innerText.includes('simulated/member-3')")
        keep(window, "mlflow-nested.png", tmp_path)


def test_mlflows_charts_have_data(ui, tmp_path):
    address, experiment, parent = ui
    with browser(tmp_path / "profile", width=1400, height=1800) as window:
        window.open(f"{address}/#/experiments/{experiment}/runs/{parent}/model-metrics")
        drawn = "return document.querySelectorAll('.js-plotly-plot .scatterlayer .trace path.js-line').length"
        assert window.wait(drawn) >= 1
        keep(window, "mlflow-charts.png", tmp_path)
