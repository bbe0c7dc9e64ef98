"""``clantune lineage``: JSON and GraphML of a run, whole and in the middle."""

from __future__ import annotations

import io
import json

import networkx
import pytest

from clantune_scale.cli.lineage import family_graph
from clantune_scale.core.genome import Genome
from clantune_scale.core.lineage import Lineage, RoundRecord
from clantune_scale.core.rounds import Phase, PhaseKind


def test_json_is_the_lineage(call, finished_run):
    said = call("lineage", finished_run.folder)
    assert list(Lineage.from_json(said.data)) == list(finished_run.lineage)
    assert len(call("lineage", finished_run.half).data["rounds"]) < len(finished_run.lineage)


def test_graphml_is_read_by_networkx_with_losses_and_genes(call, finished_run, tmp_path):
    path = tmp_path / "family.graphml"
    said = call("lineage", finished_run.folder, "--format", "graphml", "--to", path, "--json")
    assert said.data["file"] == str(path)
    graph = networkx.read_graphml(path)
    lineage = finished_run.lineage
    assert graph.number_of_nodes() == 2 * len(lineage)
    assert graph.nodes["r0m1"]["loss"] == lineage[0].losses[1]
    assert graph.nodes["r0m1"]["gene_lr"] == lineage[0].genomes[1].values["lr"]
    printed = networkx.read_graphml(
        io.BytesIO(call("lineage", finished_run.folder, "--format", "graphml").out.encode())
    )
    assert set(printed.edges) == set(graph.edges)


@pytest.mark.parametrize("run", ["folder", "half"])
def test_every_state_has_the_parent_that_its_donor_was(call, finished_run, run):
    lineage = Lineage.from_json(json.loads(call("lineage", getattr(finished_run, run)).out))
    graph = family_graph(lineage)
    for record in list(lineage)[1:]:
        before = lineage[record.index - 1]
        for member in range(2):
            (parent,) = graph.predecessors(f"r{record.index}m{member}")
            assert parent == f"r{before.index}m{before.donors[member]}"
            assert graph.edges[parent, f"r{record.index}m{member}"]["clone"] == (before.donors[member] != member)


def test_after_a_restored_round_the_next_descends_from_the_last_one_that_was_kept():
    def record(index, donors, *, restored=False, kept=True):
        genomes = (Genome({"lr": 1.0}), Genome({"lr": 2.0}))
        phases = (Phase(PhaseKind.COOPERATIVE, 5),)
        return RoundRecord(index, 5 * index, phases, genomes, (1.0, None), donors, restored, kept and not restored)

    records = (
        record(0, (1, 1)),
        record(1, (0, 1), kept=False),
        record(2, (0, 1), restored=True),
        record(3, (0, 1)),
    )
    graph = family_graph(Lineage(records))
    assert list(graph.successors("r2m0")) == []
    assert list(graph.predecessors("r2m0")) == ["r1m0"]  # it did train on from there
    assert list(graph.predecessors("r3m0")) == ["r0m1"]
    assert "loss" not in graph.nodes["r0m1"]  # GraphML knows no null


def test_an_average_has_all_its_parents_with_their_shares():
    genomes = (Genome({"lr": 1.0}), Genome({"lr": 2.0}))
    phase = (Phase(PhaseKind.COOPERATIVE, 5),)
    first = RoundRecord(0, 0, phase, genomes, (1.0, 2.0), (0, 1), average=(0.25, 0.75))
    graph = family_graph(Lineage((first, RoundRecord(1, 5, phase, genomes, (1.0, 2.0), (0, 1)))))
    for heir in ("r1m0", "r1m1"):
        assert {p: graph.edges[p, heir]["share"] for p in graph.predecessors(heir)} == {"r0m0": 0.25, "r0m1": 0.75}
