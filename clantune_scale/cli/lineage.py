"""``clantune lineage``: who came from whom, as JSON or as a graph."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from clantune_scale.cli.command import Answer, Command
from clantune_scale.cli.opened_run import add_run_argument, open_run
from clantune_scale.core.lineage import Lineage, RoundRecord


def family_graph(lineage: Lineage) -> Any:
    """A networkx ``DiGraph``: a node ``r<round>m<member>`` per member and round, an edge from a state to its heir.

    Nodes hold round, member, steps, loss and each gene (``gene_<name>``); edges say whether they are clones, and
    how large a share of the heir's weights they are (below 1 where members were averaged). After a restored
    round, members descend from the last one whose state was kept.
    """
    # networkx takes a third of a second to import; most commands do not need it.
    import networkx

    graph = networkx.DiGraph()
    carried: dict[int, dict[tuple[int, int], float]] = {}
    kept = carried
    for record in lineage:
        for member in range(len(record.genomes)):
            name = f"r{record.index}m{member}"
            graph.add_node(name, **_attributes(record, member))
            for (index, parent), share in carried.get(member, {}).items():
                graph.add_edge(f"r{index}m{parent}", name, clone=parent != member and share == 1.0, share=share)
        carried = {member: _carried(record, member, kept) for member in range(len(record.genomes))}
        kept = carried if record.kept else kept
    return graph


def _carried(
    record: RoundRecord, member: int, kept: dict[int, dict[tuple[int, int], float]]
) -> dict[tuple[int, int], float]:
    """What a member carries after a round: (round, member) of the states in it, and their shares.

    Args:
        record: of the round.
        member: whose.
        kept: likewise by member, after the last round whose state was kept.
    """
    if record.restored:
        return kept.get(record.donors[member], {})
    if record.average is None:
        return {(record.index, record.donors[member]): 1.0}
    shares: dict[tuple[int, int], float] = {}
    for holder, weight in enumerate(record.average):
        state = (record.index, record.donors[holder])
        shares[state] = shares.get(state, 0.0) + weight
    return {state: share for state, share in shares.items() if share}


def _attributes(record: RoundRecord, member: int) -> dict[str, Any]:
    # GraphML knows no null: a loss that was not finite is left out.
    loss = record.losses[member]
    return {
        "round": record.index,
        "member": member,
        "start_step": record.start_step,
        "end_step": record.end_step,
        "restored": record.restored,
        **({} if loss is None else {"loss": loss}),
        **{f"gene_{name}": float(value) for name, value in record.genomes[member].values.items()},
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--format", choices=("json", "graphml"), default="json", help="default: json")
    parser.add_argument("--to", metavar="FILE", help="write it there instead of standard output")


def _run(arguments: argparse.Namespace) -> Answer:
    lineage = open_run(arguments.run_path).lineage()
    plain = lineage.to_json()
    if arguments.format == "graphml":
        import networkx

        text = "\n".join(networkx.generate_graphml(family_graph(lineage), named_key_ids=True))
        data: dict[str, Any] = {**plain, "graphml": text}
    else:
        text, data = json.dumps(plain, indent=1), plain
    if arguments.to:
        Path(arguments.to).write_text(text + "\n", encoding="utf-8")
        return Answer(f"{len(lineage)} rounds written to {arguments.to}", {**plain, "file": arguments.to})
    return Answer(text, data)


COMMAND = Command(
    name="lineage",
    summary="who came from whom, as JSON or GraphML",
    description="""Prints each finished round: genomes, losses, donors. As GraphML it is a family tree for Gephi, yEd,
Cytoscape or networkx: a node per member and round, an edge from each state to the one that trained on from it.""",
    examples="""  clantune lineage quickstart > lineage.json
  clantune lineage quickstart --format graphml --to family.graphml""",
    add_arguments=_add_arguments,
    run=_run,
)
