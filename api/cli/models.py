"""`spillway models`: what is served."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.table import Table

from api.cli.api_client import ApiClient
from scheduler.settings import Settings


def show_models(settings: Settings, *, as_json: bool) -> None:
    """A table on a terminal, names alone in a pipe."""
    client = ApiClient(settings)
    try:
        found = client.get("/v1/models")["data"]
    finally:
        client.close()
    console = Console(highlight=False)
    if as_json:
        typer.echo(json.dumps(found))
    elif not console.is_terminal:
        for model in found:
            typer.echo(model["id"])
    else:
        table = Table("model", "context", box=None, header_style="dim")
        for position, model in enumerate(found):
            name = f"{model['id']} [dim](default)[/]" if position == 0 else model["id"]
            table.add_row(name, f"{model.get('max_input_tokens', '–')} tokens")
        console.print(table)
