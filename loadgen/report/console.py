"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from prfaas.loadgen.report.tables import Table
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

NARROW = 100
"""Where nobody says how wide the terminal is."""


def show(tables: Sequence[Table], console: Console | None = None) -> None:
    """On stdout by default. Text is shown as it is: a name in brackets is no markup."""
    out = console or Console(highlight=False)
    if not out.is_terminal and console is None:
        out = Console(highlight=False, width=NARROW)
    for table in tables:
        made = RichTable(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
        made.show_header = any(table.columns)
        for i, column in enumerate(table.columns):
            made.add_column(Text(column), justify="right" if i else "left", no_wrap=i > 0)
        for row in table.rows:
            made.add_row(*(Text(cell) for cell in row))
        out.print(made)
        if table.note:
            out.print(Text(table.note, style="dim"))
