"""The report as one HTML page without scripts or external files, readable on a telephone and on paper."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from clantune_scale.tracking.report import findings
from clantune_scale.tracking.report.canvas import Drawing
from clantune_scale.tracking.report.influence import influence
from clantune_scale.tracking.report.series import Run

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid #bbb; }
h3 { font-size: 1.05rem; margin: 0 0 0.25rem; }
ul { padding-left: 1.2rem; margin: 0.3rem 0; }
.grid { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
figcaption, .note, footer { font-size: 0.875rem; color: #444; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.95rem; overflow-wrap: normal; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 0.9em; }
@media print {
  @page { margin: 15mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .grid { display: block; columns: 2; column-gap: 8mm; }
  figure { margin-bottom: 6mm; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
}
"""


def page(run: Run, pictures: Sequence[tuple[Drawing, str]]) -> str:
    """The whole page.

    Args:
        run: the run.
        pictures: drawings with their ``<svg>`` elements, in order.
    """
    name = escape(str(run.start.get("name") or "clan run"))
    figures = "\n".join(_figure(drawing, svg) for drawing, svg in pictures)
    genes = "\n".join(f"<h3>{escape(gene.name)}</h3>\n{_list(findings.of_gene(run, gene))}" for gene in run.genes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: clan training report</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p>{escape(_setup(run))}</p>
</header>
<main>
<section id="outcome">{_list(findings.outcome(run))}</section>
<section id="next-run"><h2>For the next run</h2>
{_list(findings.next_run(run))}
<div class="grid">
<div><h3>This run</h3>
{_list(findings.health(run))}</div>
<div>{genes}</div>
</div></section>
<section id="genes"><h2>Genes</h2>{_gene_table(run)}</section>
<section id="pictures"><h2>Plots</h2>
<div class="grid">
{figures}
</div></section>
<section id="members"><h2>Members in the last round</h2>{_member_table(run)}</section>
<section id="made-with"><h2>Package versions</h2>{_versions(run)}</section>
</main>
<footer><p>Written {time.strftime("%Y-%m-%d %H:%M:%S %z")} from the run's events file.</p></footer>
</body>
</html>
"""


def _setup(run: Run) -> str:
    start = run.start
    ranks = len(start["member_ranks"][0])
    hardware = start.get("hardware") or {}
    each = f"{ranks} rank{'s' * (ranks != 1)}" + (f" on {hardware['device']}" if hardware.get("device") else "")
    return (
        f"Strategy {start['strategy']}, {start['population_size']} members of {each}, "
        f"genes {', '.join(gene.name for gene in run.genes) or 'none'}, "
        f"batch of the clan {start['batch']['clan_batch']:,} samples."
    )


def _list(sentences: Sequence[str]) -> str:
    if not sentences:
        return "<p>No findings.</p>"
    return "<ul>\n" + "\n".join(f"<li>{_prose(sentence)}</li>" for sentence in sentences) + "\n</ul>"


def _prose(sentence: str) -> str:
    """Escaped HTML; text between a pair of backquotes is code."""
    parts = escape(sentence).split("`")
    if len(parts) % 2 == 0:
        return escape(sentence)
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _figure(drawing: Drawing, svg: str) -> str:
    notes = f'<br><span class="note">Reduced: {escape("; ".join(drawing.notes))}.</span>' if drawing.notes else ""
    caption = escape(drawing.caption)
    title = escape(drawing.title)
    return (
        f'<figure id="{escape(drawing.name)}">\n<h3>{title}</h3>\n<div role="img" aria-label="{title}. {caption}">{svg}'
        f"</div>\n<figcaption>{caption}{notes}</figcaption>\n</figure>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _gene_table(run: Run) -> str:
    if not run.genes:
        return "<p>The run had no genes.</p>"
    header = ("gene", "kind", "scale", "lower bound", "initial", "final", "upper bound", "loss explained")
    rows = []
    for gene in run.genes:
        told = influence(run, gene)
        low, high = gene.bounds
        numbers = (f"{value:.4g}" for value in (low, told.first, told.last, high))
        explained = "unknown" if told.explained is None else f"{told.explained:.0%}"
        rows.append((gene.name, gene.kind, gene.scale, *numbers, explained))
    return _table(header, rows)


def _member_table(run: Run) -> str:
    header = ("member", "loss", "± standard error", *(gene.name for gene in run.genes), "learning rate")
    rows = []
    for member in range(run.num_members):
        measured = [f"{run.measured[name][-1, member]:.4f}" for name in ("loss", "standard_error")]
        genes = [f"{run.values[gene.name][-1, member]:.4g}" for gene in run.genes]
        rows.append((str(member), *measured, *genes, f"{run.rates[-1, member]:.3g}"))
    return _table(header, rows)


def _versions(run: Run) -> str:
    return _table(("package", "version"), [(name, version) for name, version in run.start.get("versions", {}).items()])
