"""Prints tables of batches, files, webhooks and schedules: ids stay whole, what else has no room is cut or left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import typer
from rich.table import Column, Table
from rich.text import Text

from api.cli.plain_text import wide_console

GAP = 2  # between columns
NARROWEST = 6  # a column with less room than this says nothing


def print_list(
    found: Sequence[dict[str, Any]],
    table: Callable[[Sequence[dict[str, Any]]], Table],
    *,
    kept: int,
    none: str,
    as_json: bool,
) -> None:
    """A list that the API answered: as JSON, as `none` where it is empty, else as a table (see `print_table`)."""
    if as_json:
        typer.echo(json.dumps(found))
    elif not found:
        typer.echo(none)
    else:
        print_table(table(found), kept=kept)


def print_table(table: Table, kept: int) -> None:
    """The first `kept` columns are whole however narrow the terminal is; the others share what is left, in order."""
    console = wide_console()
    left = console.width
    for position, column in enumerate(list(table.columns)):
        wanted = _width(column)
        if position >= kept and left < min(wanted, NARROWEST):
            del table.columns[position:]
            break
        column.width = wanted if position < kept else min(wanted, left)
        left -= column.width + GAP
    console.print(table)


def _width(column: Column) -> int:
    cells = [cell if isinstance(cell, Text) else Text(str(cell)) for cell in column.cells]
    return max(cell.cell_len for cell in [*cells, Text(str(column.header))])
