"""`spillway schedules`: jobs that recur, over the HTTP API."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer
from rich.table import Table
from rich.text import Text

from api.cli.job_tables import plain_table
from api.cli.options import ApiKey, Home, Json, Model, Url, connected
from api.cli.plain_text import day_of, printable
from api.cli.record_tables import print_list
from scheduler.errors import ClientError

app = typer.Typer(help="Schedules: jobs that recur.", no_args_is_help=True)
ScheduleId = Annotated[str, typer.Argument(help="From `add` or the list.", metavar="ID")]
PATH = "/v1/schedules"


@app.command()
def add(
    cron: Annotated[str, typer.Argument(help="minute hour day month weekday, or @hourly, @daily, …", metavar="CRON")],
    prompt: Annotated[str | None, typer.Argument(help="What the model is asked.", metavar="PROMPT")] = None,
    body: Annotated[
        Path | None, typer.Option("--body", metavar="FILE", help="The whole request as JSON, - for stdin.")
    ] = None,
    name: Annotated[str, typer.Option(help="What it is called.")] = "",
    timezone: Annotated[str, typer.Option(metavar="ZONE", help="Of the cron expression, as Europe/Berlin.")] = "UTC",
    model: Model = "default",
    priority: Annotated[str | None, typer.Option(metavar="CLASS", help="high, normal, low or batch.")] = None,
    webhook: Annotated[
        str | None, typer.Option(metavar="ID|URL", help="The registered endpoint that is told of each end.")
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Make a schedule. Piped, only its id is printed."""
    wanted: dict[str, Any] = {"cron": cron, "name": name, "timezone": timezone, "body": _body(prompt, body, model)}
    wanted |= {key: value for key, value in (("priority", priority), ("webhook", webhook)) if value is not None}
    with connected(url, api_key, home) as client:
        made = client.post(PATH, wanted)
    if sys.stdout.isatty():
        typer.echo(f"{made['id']} runs next at {_turn(made)}.")
    else:
        typer.echo(made["id"])


@app.command("list")
def list_schedules(as_json: Json = False, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """All schedules."""
    with connected(url, api_key, home) as client:
        found = client.get(PATH)["data"]
    print_list(found, _table, kept=3, none="No schedules yet.", as_json=as_json)


@app.command()
def pause(schedule: ScheduleId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """No more turns until it is resumed."""
    with connected(url, api_key, home) as client:
        client.post(f"{PATH}/{schedule}/pause")
    typer.echo(f"Paused {schedule}.")


@app.command()
def resume(schedule: ScheduleId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Turns again, from now on."""
    with connected(url, api_key, home) as client:
        resumed = client.post(f"{PATH}/{schedule}/resume")
    typer.echo(f"{schedule} runs next at {_turn(resumed)}.")


@app.command()
def run(schedule: ScheduleId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """One job now, beside the turns; its id is printed."""
    with connected(url, api_key, home) as client:
        job = client.post(f"{PATH}/{schedule}/run")
    typer.echo(job["id"])


@app.command()
def remove(schedule: ScheduleId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Remove a schedule; the jobs that it made stay."""
    with connected(url, api_key, home) as client:
        client.send("DELETE", f"{PATH}/{schedule}")
    typer.echo(f"Removed {schedule}.")


def _table(found: Sequence[dict[str, Any]]) -> Table:
    table = plain_table("id", "next", "zone", "cron", "name", "last job", "error")
    for one in found:
        following = "paused" if one["paused"] else _moment(one["next_ms"], one["timezone"])
        error = Text(printable(one["last_error"] or ""), "red")
        row = (one["id"], following, one["timezone"], one["cron"], printable(one["name"]), one["last_job_id"] or "–")
        table.add_row(*row, error)
    return table


def _body(prompt: str | None, file: Path | None, model: str) -> Any:
    if (prompt is None) == (file is None):
        raise ClientError("Give a PROMPT or --body FILE.")
    if file is None:
        return {"model": model, "messages": [{"role": "user", "content": prompt}]}
    try:
        return json.loads(sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClientError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ClientError(f"{file} is not JSON: {error}.") from error


def _turn(schedule: dict[str, Any]) -> str:
    return f"{_moment(schedule['next_ms'], schedule['timezone'])} {schedule['timezone']}"


def _moment(moment_ms: int | None, zone: str) -> str:
    """In the schedule's own zone, where its expression can be compared with it."""
    if moment_ms is None:
        return "–"
    try:
        there = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # the service knows it, this machine does not
        return day_of(moment_ms // 1000)
    return datetime.fromtimestamp(moment_ms / 1000, there).strftime("%a %Y-%m-%d %H:%M")
