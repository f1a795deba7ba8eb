"""The report of `hybridpar verify` on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybridpar.proof.report import Report, Row

_COLOURS = {"equal": "green", "rounding": "yellow", "different": "bold red"}


def show(report: Report, console: Console) -> None:
    """Print the table, what was noticed, and the result in a sentence."""
    if report.rows:
        table = Table(title=f"{report.mesh} against one process, {report.steps} steps", title_justify="left")
        for title, side in (("run", "left"), ("quantity", "left"), ("largest error", "right"), ("allowed", "right"),
                            ("of size", "right"), ("where", "left"), ("verdict", "left")):  # fmt: skip
            table.add_column(title, justify=side, overflow="fold")
        for row in report.rows:
            table.add_row(*_cells(row))
        console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    console.print(Text(report.sentence, style="green" if report.equal else "bold red"), soft_wrap=True)


def _cells(row: Row) -> list[str | Text]:
    allowed = f"{row.allowed:.1e}" if row.allowed else "0"
    error, where = (f"{row.error:.1e}", row.where) if row.error else ("0", "")
    verdict = Text(row.verdict, style=_COLOURS[row.verdict])
    return [row.run, row.quantity, error, allowed, f"{row.scale:.1e}", where, verdict]
