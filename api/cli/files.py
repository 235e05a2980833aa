"""`spillway files`: list and delete stored files, over the HTTP API. Batches upload and fetch theirs by themselves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from api.cli.options import ApiKey, Home, Json, Url, settings_with
from api.cli.plain_text import day_of, printable, wide_console

if TYPE_CHECKING:
    from api.cli.api_client import ApiClient

app = typer.Typer(help="Stored files: what batches read and write.", no_args_is_help=True)


@app.command("list")
def list_files(
    purpose: Annotated[str | None, typer.Option(metavar="NAME", help="Only these: batch, batch_output, …")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, metavar="N", help="At most so many.")] = 100,
    as_json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """The newest files."""
    chosen = "" if purpose is None else f"&purpose={purpose}"
    with opened(url, api_key, home) as client:
        found = client.get(f"/v1/files?limit={limit}{chosen}")["data"]
    if as_json:
        typer.echo(json.dumps(found))
        return
    if not found:
        typer.echo("No files yet.")
        return
    table = Table("file", "name", "purpose", "size", "created", "expires", box=None, header_style="dim")
    for file in found:
        dates = (day_of(file["created_at"]), day_of(file["expires_at"]))
        table.add_row(file["id"], printable(file["filename"]), file["purpose"], decimal(file["bytes"]), *dates)
    wide_console().print(table)


@app.command()
def delete(
    file: Annotated[list[str], typer.Argument(help="Ids from the list.", metavar="ID…")],
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Remove files and their bytes."""
    with opened(url, api_key, home) as client:
        for name in file:
            client.send("DELETE", f"/v1/files/{name}")
            typer.echo(f"Deleted {name}.")


@contextlib.contextmanager
def opened(url: str | None, api_key: str | None, home: Path | None) -> Iterator[ApiClient]:
    """The running service, closed at the end."""
    from api.cli.api_client import ApiClient

    client = ApiClient(settings_with(url=url, api_key=api_key, home=home))
    try:
        yield client
    finally:
        client.close()
