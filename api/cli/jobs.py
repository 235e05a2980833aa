"""`spillway jobs`: submit, list, show, watch, result, retry, cancel and priority, over the HTTP API."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlencode

import typer

from api.cli.job_submission import Submission, read_past
from api.cli.job_tables import job_details, job_table
from api.cli.options import ApiKey, Home, Json, Model, PriorityName, Url, connected
from api.cli.plain_text import wide_console, write_answer
from scheduler.errors import JobConflict

if TYPE_CHECKING:
    from api.cli.api_client import ApiClient

app = typer.Typer(help="Jobs: what waits, what runs, what has ended.", invoke_without_command=True)
JobId = Annotated[str, typer.Argument(help="The Spillway-Job header of an answer, or from the list.", metavar="ID")]
_MOMENT_HELP = "A time, or how long ago: 2026-12-24T18:00, 2h, 1d."
_ROOMY_COLUMNS = 100


@app.callback()
def default(context: typer.Context, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Jobs: what waits, what runs, what has ended. Without a command: the list."""
    if context.invoked_subcommand is None:
        list_jobs(url=url, api_key=api_key, home=home)


@app.command()
def submit(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; `-` or nothing: standard input.")] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="JSON", help="A whole chat completions body instead; `-`: standard input.")
    ] = None,
    model: Model = "default",
    max_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="The longest answer.")] = None,
    priority: PriorityName = None,
    at: Annotated[str | None, typer.Option(metavar="TIME", help="Not before: 2026-12-24T18:00.")] = None,
    delay: Annotated[str | None, typer.Option("--in", metavar="DURATION", help="Not before: 90s, 10m, 2h.")] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="TIME|DURATION", help="When it must have ended, or in how long.")
    ] = None,
    webhook: Annotated[
        str | None, typer.Option(metavar="ID|URL", help="The registered endpoint that is told of the end.")
    ] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Kept with the job; repeat.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option("--key", metavar="KEY", help="Sent again with the same key, it is the same job.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait, and print the answer as it comes.")] = False,
    as_json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Ask for later: the job is on disk when this returns. Piped, only its id is printed."""
    wanted = Submission(
        prompt, file, model, max_tokens, priority, at, delay, deadline, webhook, [] if metadata is None else metadata
    ).body()
    headers = {} if idempotency_key is None else {"idempotency-key": idempotency_key}
    with connected(url, api_key, home) as client:
        _, job = client.send("POST", "/v1/jobs", wanted, headers)
        _report(client, job, wait=wait, as_json=as_json)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 20,
    state: Annotated[str | None, typer.Option(metavar="STATE,…", help="queued, running, failed, …")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Of this model.")] = None,
    priority: PriorityName = None,
    batch: Annotated[str | None, typer.Option(metavar="ID", help="Lines of this batch.")] = None,
    schedule: Annotated[str | None, typer.Option(metavar="ID", help="Turns of this schedule.")] = None,
    made_since: Annotated[str | None, typer.Option("--since", metavar="TIME", help=_MOMENT_HELP)] = None,
    made_until: Annotated[str | None, typer.Option("--until", metavar="TIME", help=_MOMENT_HELP)] = None,
    after: Annotated[str | None, typer.Option(metavar="ID", help="The page behind this job.")] = None,
    as_json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """The newest jobs: waiting, running and finished."""
    wanted = {
        "limit": str(limit),
        "state": state,
        "model": model,
        "priority": priority,
        "batch_id": batch,
        "schedule_id": schedule,
        "created_after": None if made_since is None else read_past("--since", made_since),
        "created_before": None if made_until is None else read_past("--until", made_until),
        "after": after,
    }
    query = urlencode({name: value for name, value in wanted.items() if value is not None})
    with connected(url, api_key, home) as client:
        page = client.get(f"/v1/jobs?{query}")
    if as_json:
        typer.echo(json.dumps(page["data"]))
    elif not page["data"]:
        typer.echo("No jobs yet." if query == f"limit={limit}" else "No such jobs.")
    else:
        console = wide_console()
        console.print(job_table(page["data"], with_priority=console.width >= _ROOMY_COLUMNS))
        if page["has_more"] and console.is_terminal:
            console.print(f"More: --after {page['last_id']}", style="dim")


@app.command()
def show(job: JobId, as_json: Json = False, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """One job: its state, attempts, timings and usage."""
    with connected(url, api_key, home) as client:
        found = client.get(_path(job))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        wide_console().print(job_details(found))


@app.command()
def result(
    job: JobId,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for it.")] = False,
    as_json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """The answer of a job that has succeeded. Exit status 1: it failed, or has not ended."""
    with connected(url, api_key, home) as client:
        _show_result(_result(client, job, wait=wait), as_json=as_json)


@app.command()
def cancel(job: JobId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Cancel a job: at once where it waits, within two decode steps where it runs."""
    with connected(url, api_key, home) as client:
        found = client.post(f"{_path(job)}/cancel")
    typer.echo(f"Cancelled {found['id']}.")


@app.command()
def retry(job: JobId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Try a job again that failed, expired or was cancelled."""
    with connected(url, api_key, home) as client:
        found = client.post(f"{_path(job)}/retry")
    typer.echo(f"{found['id']} is {found['state']} again.")


@app.command("priority")
def change_priority(
    job: JobId,
    to: Annotated[str, typer.Argument(metavar="high|normal|low|batch", help="Its new class.")],
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Give a job that waits or runs another priority."""
    with connected(url, api_key, home) as client:
        _, found = client.send("PATCH", _path(job), {"priority": to})
    typer.echo(f"{found['id']} has priority {found['priority']}.")


@app.command()
def watch(job: JobId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Follow a job from its first token to its end, through broken connections too."""
    from api.cli.job_stream import print_answer

    with connected(url, api_key, home) as client:
        print_answer(client, quote(job, safe=""))


def _path(job: str) -> str:
    return f"/v1/jobs/{quote(job, safe='')}"


def _report(client: ApiClient, job: dict[str, Any], *, wait: bool, as_json: bool) -> None:
    """What became of a submission: its answer, the job, or its id."""
    from api.cli.job_stream import print_answer

    job_id = job["id"]
    if wait:
        typer.echo(f"Accepted {job_id}.", err=True)
        if as_json:
            _show_result(_result(client, job_id, wait=True), as_json=True)
        else:
            print_answer(client, job_id)
    elif as_json:
        typer.echo(json.dumps(job))
    elif sys.stdout.isatty():
        typer.echo(f"Accepted {job_id} ({job['state']}). Follow it: spillway jobs watch {job_id}")
    else:
        typer.echo(job_id)


def _result(client: ApiClient, job: str, *, wait: bool) -> Any:
    """The body that the job's endpoint would have sent. Raises its error, or JobConflict where it has not ended."""
    from api.cli.job_stream import follow

    if wait:
        for _ in follow(client, quote(job, safe="")):
            pass
    pauses_s = [0.2, 0.5, 1.0] if wait else []  # the last event comes just before the end is known everywhere
    while True:
        status, body = client.send("GET", f"{_path(job)}/result")
        if status == 200:
            return body
        if not pauses_s:
            raise JobConflict(f"{body['id']} is {body['state']}; wait for it with --wait.")
        time.sleep(pauses_s.pop(0))


def _show_result(body: Any, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(body))
        return
    for choice in body["choices"]:
        write_answer(choice["message"]["content"] or "")
        sys.stdout.write("\n")
