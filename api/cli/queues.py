"""`spillway queues`: what waits and runs per pool and class; pause, resume and drain."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.text import Text

from api.cli.job_tables import duration, plain_table
from api.cli.options import ApiKey, Home, Json, PriorityName, Url, connected
from api.cli.plain_text import printable, wide_console

app = typer.Typer(help="Queues: what waits and runs, per pool and priority.", invoke_without_command=True)
Pool = Annotated[str, typer.Argument(metavar="POOL", help="A pool that `spillway queues` shows.")]


@app.callback()
def default(
    context: typer.Context, as_json: Json = False, url: Url = None, api_key: ApiKey = None, home: Home = None
) -> None:
    """Queues: what waits and runs, per pool and priority. Without a command: the table."""
    if context.invoked_subcommand is not None:
        return
    with connected(url, api_key, home) as client:
        found = client.get("/admin/queues")["data"]
    _show(found, as_json=as_json)


@app.command()
def pause(
    pool: Pool,
    priority: PriorityName = None,
    as_json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Start nothing more of a pool, or of one of its classes; new jobs are still accepted."""
    with connected(url, api_key, home) as client:
        found = client.post("/admin/queues/pause", _order(pool, priority))["data"]
    _show(found, as_json=as_json)


@app.command()
def resume(
    pool: Pool,
    priority: PriorityName = None,
    as_json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Undo the same pause; of a whole pool, its draining too."""
    with connected(url, api_key, home) as client:
        found = client.post("/admin/queues/resume", _order(pool, priority))["data"]
    _show(found, as_json=as_json)


@app.command()
def drain(pool: Pool, as_json: Json = False, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Take no new jobs for a pool, and work off those that it has."""
    with connected(url, api_key, home) as client:
        found = client.post("/admin/queues/drain", _order(pool, None))["data"]
    _show(found, as_json=as_json)


def _order(pool: str, priority: str | None) -> dict[str, str]:
    return {"pool": pool} | ({} if priority is None else {"priority": priority})


def _show(queues: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(queues))
        return
    if not queues:
        typer.echo("No queues yet: no worker serves a model, and nothing waits.")
        return
    table = plain_table("pool", "priority", "waiting", "scheduled", "running", "oldest", "rate", "")
    for queue in queues:
        counts = [str(queue[name]) for name in ("waiting", "scheduled", "running")]
        rate = f"{queue['claims_per_s']:.2g}/s" if queue["claims_per_s"] >= 0.01 else "–"
        cells = [printable(queue["pool"]), queue["priority"], *counts, duration(queue["oldest_ms"]), rate]
        table.add_row(*cells, _held_up(queue))
    wide_console().print(table)


def _held_up(queue: dict[str, Any]) -> Text:
    words = [word for word in ("paused", "draining") if queue[word]]
    return Text(", ".join(words), "yellow")
