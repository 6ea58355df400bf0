"""A report as one standalone HTML page: tables and SVG plots, nothing loaded from anywhere, no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from prfaas.loadgen.report.plots import Run, plots
from prfaas.loadgen.report.summary import Summary
from prfaas.loadgen.report.tables import Table, tables

STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: light-dark(#1b1b1b, #e4e4e4); background: light-dark(#fdfdfd, #17191c); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
p.note { opacity: .75; margin: .3rem 0; }
p.warning { border-left: 4px solid #d9622b; padding-left: .7rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid light-dark(#ddd, #3a3d42); }
th:first-child, td:first-child { text-align: left; white-space: pre; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); gap: 1.2rem; }
.bars { grid-column: 1 / -1; }
svg { width: 100%; height: auto; }
"""


def page(
    title: str,
    summaries: Sequence[Summary],
    runs: Sequence[Run],
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """`summaries` and `runs` in the same order."""
    lines = [f'<p class="warning">{escape(warning)}</p>' for warning in warnings]
    lines += [f'<p class="note">{escape(note)}</p>' for note in notes]
    lines += [_table(table) for table in tables(summaries)]
    drawn = "\n".join(f'<div class="{type(plot).__name__.lower()}">{plot.svg()}</div>' for plot in plots(runs))
    body = "\n".join(lines)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{STYLE}</style>\n</head>\n'
        f'<body>\n<h1>{escape(title)}</h1>\n{body}\n<h2>plots</h2>\n<div class="plots">\n{drawn}\n</div>\n'
        f"</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    heads = "".join(f"<th>{escape(column)}</th>" for column in table.columns) if any(table.columns) else ""
    head = f"<thead><tr>{heads}</tr></thead>\n" if heads else ""
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n{head}'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>{note}"
    )
