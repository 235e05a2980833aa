"""`spillway dead`: jobs that ran out of attempts; list, show, replay and discard."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlencode

import typer
from rich.text import Text

from api.cli.job_tables import details, duration, moment, plain_table
from api.cli.options import ApiKey, Home, Json, Url, connected
from api.cli.plain_text import printable, wide_console
from scheduler.errors import InvalidRequest, JobNotFound

if TYPE_CHECKING:
    from api.cli.api_client import ApiClient

app = typer.Typer(help="Dead letters: jobs that ran out of attempts.", invoke_without_command=True)
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, from the list.")]
Pool = Annotated[str | None, typer.Option(metavar="NAME", help="Of this pool.")]
Code = Annotated[str | None, typer.Option(metavar="CODE", help="That died of this error, as worker_lost.")]
_PAGE = 1000


@app.callback()
def default(context: typer.Context, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Dead letters: jobs that ran out of attempts. Without a command: the list."""
    if context.invoked_subcommand is None:
        list_dead(url=url, api_key=api_key, home=home)


@app.command("list")
def list_dead(
    limit: Annotated[int, typer.Option(min=1, max=_PAGE, help="At most so many.")] = 20,
    pool: Pool = None,
    code: Code = None,
    as_json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """The latest dead letters, with the reason of each."""
    wanted = {"limit": str(limit), "pool": pool, "code": code}
    query = urlencode({name: value for name, value in wanted.items() if value is not None})
    with connected(url, api_key, home) as client:
        found = client.get(f"/admin/dead?{query}")["data"]
    if as_json:
        typer.echo(json.dumps(found))
        return
    if not found:
        typer.echo("No dead letters.")
        return
    table = plain_table("job", "pool", "died", "attempts", "reason")
    for letter in found:
        age = f"{duration(time.time() * 1000 - letter['died_ms'])} ago"
        reason = Text(f"{letter['reason']['code']}: {printable(letter['reason']['message'])}")
        table.add_row(letter["job_id"], printable(letter["pool"]), age, str(letter["attempt"]), reason)
    wide_console().print(table)


@app.command()
def show(job: JobId, as_json: Json = False, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """One dead letter, and whether it can be replayed."""
    with connected(url, api_key, home) as client:
        letter = _letter(client, job)
    if as_json:
        typer.echo(json.dumps(letter))
        return
    rows: list[tuple[str, Any]] = [
        ("job", letter["job_id"]),
        ("pool", printable(letter["pool"])),
        ("priority", letter["priority"]),
        ("tenant", printable(letter["tenant"])),
        ("died", moment(letter["died_ms"])),
        ("attempts", str(letter["attempt"])),
        ("reason", Text(f"{letter['reason']['code']}: {printable(letter['reason']['message'])}", "red")),
        ("replayable", "yes" if letter["replayable"] else "no: its request is not kept any more"),
    ]
    wide_console().print(details(rows))


@app.command()
def replay(
    job: Annotated[str | None, typer.Argument(metavar="ID", help="The job's id, from the list.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them, or those of --pool and --code.")] = False,
    pool: Pool = None,
    code: Code = None,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Try dead letters again: same ids, next attempts."""
    if (job is None) is not everything:
        raise InvalidRequest("Give the id of one dead letter, or --all.")
    with connected(url, api_key, home) as client:
        if job is not None:
            found = client.post(f"/admin/dead/{quote(job, safe='')}/replay")
            typer.echo(f"{found['id']} is {found['state']} again.")
            return
        replayed, failed = _replay_all(client, pool, code)
    for letter in failed:
        typer.echo(f"{letter['job_id']}: {printable(letter['error']['message'])}", err=True)
    typer.echo(f"Replayed {replayed}.")
    if failed:
        raise typer.Exit(1)


@app.command()
def discard(job: JobId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Give a dead letter up; its record stays."""
    with connected(url, api_key, home) as client:
        client.send("DELETE", f"/admin/dead/{quote(job, safe='')}")
    typer.echo(f"Discarded {job}.")


def _replay_all(client: ApiClient, pool: str | None, code: str | None) -> tuple[int, list[dict[str, Any]]]:
    """How many were replayed, and which could not be."""
    wanted = {"pool": pool, "code": code, "limit": _PAGE}
    body = {key: value for key, value in wanted.items() if value is not None}
    replayed = 0
    while True:
        done = client.post("/admin/dead/replay", body)
        replayed += len(done["replayed"])
        if len(done["replayed"]) < _PAGE:  # what failed before the end of a full page comes again in the next
            return replayed, done["failed"]


def _letter(client: ApiClient, job: str) -> dict[str, Any]:
    after = ""
    while True:
        page = client.get(f"/admin/dead?limit={_PAGE}{after}")
        for letter in page["data"]:
            if letter["job_id"] == job:
                return letter
        if not page["has_more"]:
            raise JobNotFound(f"{job} is no dead letter; `spillway dead` lists them.")
        after = f"&after={page['last_id']}"
