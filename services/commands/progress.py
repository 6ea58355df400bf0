"""The progress bar of long set-up work, on stderr so that stdout stays what was asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prfaas.services.model_store import Progress
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


@contextlib.contextmanager
def progress_bar(*, counts: bool = False) -> Iterator[Progress]:
    """A callback for `ensure_model`; the bar appears with the first call and goes when the block ends. `counts`: the
    numbers are no bytes."""
    amount = MofNCompleteColumn() if counts else DownloadColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn())
    console = Console(stderr=True)
    bar = Bar(*columns, console=console, transient=True)
    task = bar.add_task("", visible=False)
    said: list[str] = []

    def report(what: str, done: int, total: int) -> None:
        if what not in said:
            said.append(what)
            bar.update(task, visible=True)
            if console.is_terminal:
                bar.start()
            else:
                console.print(f"{what} ...")
        bar.update(task, description=what, completed=done, total=total or None)

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()
