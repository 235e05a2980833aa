"""`spillway files`: list and delete stored files, over the HTTP API. Batches upload and fetch theirs by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from api.cli.job_tables import plain_table
from api.cli.options import ApiKey, Home, Json, Url, connected
from api.cli.plain_text import age_of, day_of, printable
from api.cli.record_tables import print_list

app = typer.Typer(help="Stored files: what batches read and write.", no_args_is_help=True)


@app.command("list")
def list_files(
    purpose: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only these: batch, batch_output, user_data, …")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, metavar="N", help="At most so many.")] = 100,
    as_json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """The newest files."""
    chosen = "" if purpose is None else f"&purpose={purpose}"
    with connected(url, api_key, home) as client:
        found = client.get(f"/v1/files?limit={limit}{chosen}")["data"]
    print_list(found, _table, kept=4, none="No files yet.", as_json=as_json)


@app.command()
def delete(
    file: Annotated[list[str], typer.Argument(help="Ids from the list.", metavar="ID…")],
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Remove files and their bytes."""
    with connected(url, api_key, home) as client:
        for name in file:
            client.send("DELETE", f"/v1/files/{name}")
            typer.echo(f"Deleted {name}.")


def _table(found: Sequence[dict[str, Any]]) -> Table:
    table = plain_table("file", "purpose", "size", "age", "name", "expires")
    for file in found:
        cells = (file["id"], file["purpose"], decimal(file["bytes"]), age_of(file["created_at"]))
        table.add_row(*cells, printable(file["filename"]), day_of(file["expires_at"]))
    return table
