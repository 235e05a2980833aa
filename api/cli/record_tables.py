"""Prints tables of batches, files, webhooks and schedules: ids stay whole, what else has no room is cut."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from api.cli.plain_text import wide_console


def print_table(table: Table, kept: int) -> None:
    """The first `kept` columns are whole however narrow the terminal is; the others are cut."""
    console = wide_console()
    for column in table.columns[:kept]:
        cells = [cell if isinstance(cell, Text) else Text(str(cell)) for cell in column.cells]
        column.min_width = max(cell.cell_len for cell in [*cells, Text(str(column.header))])
    console.print(table)
