"""`spillway jobs`: list, show, watch and cancel, over the HTTP API."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from api.cli.options import ApiKey, Home, Json, Url, settings_with
from api.cli.plain_text import printable, wide_console, write_answer
from scheduler.errors import from_code

if TYPE_CHECKING:
    from api.cli.api_client import ApiClient

app = typer.Typer(help="Jobs: what waits, what runs, what has ended.", invoke_without_command=True)
JobId = Annotated[str, typer.Argument(help="The Spillway-Job header of an answer, or from the list.", metavar="ID")]
_STYLES = {"running": "cyan", "succeeded": "green", "failed": "red", "expired": "red", "cancelled": "dim"}
_RECONNECTS = 5
_ROOMY_COLUMNS = 100


@app.callback()
def default(context: typer.Context, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Jobs: what waits, what runs, what has ended. Without a command: the list."""
    if context.invoked_subcommand is None:
        list_jobs(url=url, api_key=api_key, home=home)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 20,
    as_json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """The newest jobs: waiting, running and finished."""
    with _client(url, api_key, home) as client:
        found = client.get(f"/v1/jobs?limit={limit}")["data"]
    if as_json:
        typer.echo(json.dumps(found))
    elif not found:
        typer.echo("No jobs yet.")
    else:
        console = wide_console()
        console.print(_table(found, with_priority=console.width >= _ROOMY_COLUMNS))


@app.command()
def show(job: JobId, as_json: Json = False, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """One job: its state, attempts, timings and usage."""
    with _client(url, api_key, home) as client:
        found = client.get(f"/v1/jobs/{job}")
    if as_json:
        typer.echo(json.dumps(found))
    else:
        wide_console().print(_details(found))


@app.command()
def cancel(job: JobId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Cancel a job: at once where it waits, within two decode steps where it runs."""
    with _client(url, api_key, home) as client:
        found = client.post(f"/v1/jobs/{job}/cancel")
    typer.echo(f"Cancelled {found['id']}.")


@app.command()
def watch(job: JobId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Follow a job from its first token to its end, through broken connections too."""
    with _client(url, api_key, home) as client:
        for name, event in _events(client, job):
            _show_event(name, event)


@contextlib.contextmanager
def _client(url: str | None, api_key: str | None, home: Any) -> Iterator[ApiClient]:
    from api.cli.api_client import ApiClient

    client = ApiClient(settings_with(url=url, api_key=api_key, home=home))
    try:
        yield client
    finally:
        client.close()


def _events(client: ApiClient, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All events of a job; a broken connection is taken up again behind the last event that came."""
    from api.cli.api_client import NotReachable

    seen: str | None = None
    failures = 0
    while failures <= _RECONNECTS:
        headers = {} if seen is None else {"last-event-id": seen}
        try:
            with client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as events:
                for event in events:
                    seen, failures = event.id, 0
                    yield event.event, json.loads(event.data)
                    if event.event in {"finished", "failed"}:
                        return
        except NotReachable:
            if seen is None or failures == _RECONNECTS:
                raise
        failures += 1
        time.sleep(0.2 * failures)
    raise NotReachable(f"The events of {job} stopped before its end; `spillway jobs show {job}` says how it is.")


def _show_event(name: str, event: dict[str, Any]) -> None:
    match name:
        case "delta":
            for choice in event["choices"]:
                write_answer(choice["text"])
        case "finished":
            sys.stdout.write("\n")
        case "failed":
            sys.stdout.write("\n")
            raise from_code(event["error"]["code"], event["error"]["message"])
        case _:
            return


def _table(jobs: list[dict[str, Any]], *, with_priority: bool) -> Table:
    table = Table("job", "state", "model", "age", "tokens", "took", box=None, header_style="dim", pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    if with_priority:
        table.add_column("priority")
    for job in jobs:
        state = Text(job["state"], _STYLES.get(job["state"], ""))
        usage = job["usage"] or {}
        took = _duration(job["timings"]["total_ms"])
        tokens = str(usage.get("completion_tokens", "–"))
        age = _duration(time.time() * 1000 - job["created_ms"])
        table.add_row(job["id"], state, job["model"], age, tokens, took, *([job["priority"]] if with_priority else []))
    return table


def _details(job: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    usage, timings = job["usage"] or {}, job["timings"]
    rows: list[tuple[str, Any]] = [
        ("job", job["id"]),
        ("state", Text(job["state"], _STYLES.get(job["state"], ""))),
        ("model", job["model"]),
        ("priority", job["priority"]),
        ("tenant", job["tenant"]),
        ("created", _moment(job["created_ms"])),
        ("waited", _duration(timings["queued_ms"])),
        ("first token", _duration(timings["first_token_ms"])),
        ("took", _duration(timings["total_ms"])),
    ]
    rows += [(f"attempt {attempt['attempt']}", attempt["worker"]) for attempt in job["attempts"]]
    if usage:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        rows.append(("tokens", f"{usage['prompt_tokens']} in ({cached} cached), {usage['completion_tokens']} out"))
    if job["error"] is not None:
        rows.append(("error", Text(f"{job['error']['code']}: {printable(job['error']['message'] or '')}", "red")))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _moment(moment_ms: int) -> str:
    return datetime.fromtimestamp(moment_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _duration(ms: float | None) -> str:
    if ms is None:
        return "–"
    seconds = ms / 1000
    if seconds < 1:
        return f"{ms:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
