"""`spillway batch`: submit a file of requests, follow it, and fetch its results, over the HTTP API."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from api.cli.job_tables import plain_table
from api.cli.options import ApiKey, Home, Json, Url, connected
from api.cli.plain_text import age_of, day_of, printable, wide_console
from api.cli.record_tables import print_list
from scheduler.errors import BatchConflict, ClientError, SpillwayError

if TYPE_CHECKING:
    from api.cli.api_client import ApiClient

app = typer.Typer(help="Batches: files of requests, run beside everything else.", no_args_is_help=True)
BatchId = Annotated[str, typer.Argument(help="From `submit` or the list.", metavar="ID")]
Output = Annotated[
    Path | None, typer.Option(metavar="OUT", help="Where the answers go; failed lines go to OUT.errors beside it.")
]
_STYLES = {"completed": "green", "failed": "red", "expired": "red", "in_progress": "cyan", "cancelled": "dim"}
SHOWN_ERRORS = 10  # the rest is in `batch show`
_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="One request a line: custom_id, method, url, body.", metavar="FILE")],
    endpoint: Annotated[str, typer.Option(metavar="PATH", help="What the lines are for.")] = "/v1/chat/completions",
    window: Annotated[str, typer.Option(metavar="HOURS", help="How long it may take, 1h to 168h.")] = "24h",
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Kept with the batch; repeat.")
    ] = None,
    webhook: Annotated[
        str | None, typer.Option(metavar="ID|URL", help="The registered endpoint that is told of the end.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end. Exit status 1: a line failed.")] = False,
    output: Output = None,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Upload a file and run its lines. Piped, only the batch's id is printed."""
    body: dict[str, Any] = {"endpoint": endpoint, "completion_window": window, "metadata": _pairs(metadata)}
    if webhook is not None:
        body["webhook"] = webhook
    with connected(url, api_key, home) as client:
        batch = _create(client, body, _upload(client, file)["id"])
        if sys.stdout.isatty():
            typer.echo(f"Accepted {batch['id']}.")
        else:
            typer.echo(batch["id"])
        if not (wait or output is not None):
            if sys.stdout.isatty():
                typer.echo(f"Follow it: spillway batch results {batch['id']} --wait --output answers.jsonl")
            return
        raise typer.Exit(_finish(client, batch, output))


@app.command("list")
def list_batches(
    limit: Annotated[int, typer.Option(min=1, max=100, metavar="N", help="At most so many.")] = 20,
    as_json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """The newest batches."""
    with connected(url, api_key, home) as client:
        found = client.get(f"/v1/batches?limit={limit}")["data"]
    print_list(found, _table, kept=6, none="No batches yet.", as_json=as_json)


@app.command()
def show(batch: BatchId, as_json: Json = False, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """One batch: its status, counts, files and errors."""
    with connected(url, api_key, home) as client:
        found = client.get(f"/v1/batches/{batch}")
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    counts, usage = found["request_counts"], found["usage"]
    table.add_row("batch", found["id"])
    table.add_row("status", _status(found))
    table.add_row("lines", f"{counts['total']} ({counts['completed']} done, {counts['failed']} failed)")
    table.add_row("model", found["model"] or "–")
    for name in ("input", "output", "error"):
        table.add_row(name, found[f"{name}_file_id"] or "–")
    table.add_row("created", day_of(found["created_at"]))
    table.add_row("expires", day_of(found["expires_at"]))
    if usage is not None:
        table.add_row("tokens", f"{usage['input_tokens']} in, {usage['output_tokens']} out")
    for error in _errors(found):
        table.add_row("error", Text(error, "red"))
    wide_console().print(table)


@app.command()
def cancel(batch: BatchId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Cancel a batch; the answers it has are kept."""
    with connected(url, api_key, home) as client:
        found = client.post(f"/v1/batches/{batch}/cancel")
    typer.echo(f"{found['id']} is {found['status']}.")


@app.command()
def results(
    batch: BatchId,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end first.")] = False,
    output: Output = None,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Fetch what a batch has: answers and failed lines, to OUT or to standard output. Exit status 1: a line failed."""
    with connected(url, api_key, home) as client:
        found = client.get(f"/v1/batches/{batch}")
        if found["status"] not in _ENDED and not wait:
            raise BatchConflict(f"{found['id']} is {found['status']}; wait for its end with --wait.")
        raise typer.Exit(_finish(client, found, output, to_stdout=output is None))


def _table(found: Sequence[dict[str, Any]]) -> Table:
    table = plain_table("batch", "status", "lines", "done", "failed", "age", "model")
    for batch in found:
        counts = (str(batch["request_counts"][name]) for name in ("total", "completed", "failed"))
        model = printable(batch["model"] or "–")
        table.add_row(batch["id"], _status(batch), *counts, age_of(batch["created_at"]), model)
    return table


def _finish(client: ApiClient, batch: dict[str, Any], output: Path | None, *, to_stdout: bool = False) -> int:
    """Follow a batch to its end and fetch its files; the exit status."""
    from api.cli.batch_watch import follow

    ended = follow(client, batch["id"]) if batch["status"] not in _ENDED else batch
    errors = _errors(ended)
    for error in errors[:SHOWN_ERRORS]:
        typer.echo(f"spillway: {error}", err=True)
    if len(errors) > SHOWN_ERRORS:
        typer.echo(f"… and {len(errors) - SHOWN_ERRORS} more: spillway batch show {ended['id']}", err=True)
    if output is not None:
        _save(client, ended["output_file_id"], output)
        _save(client, ended["error_file_id"], output.with_name(f"{output.name}.errors"))
    elif to_stdout:
        for name in ("output_file_id", "error_file_id"):
            if ended[name] is not None:
                client.download(ended[name], sys.stdout.buffer)
    counts = ended["request_counts"]
    typer.echo(_summary(ended, counts), err=True)
    return 0 if ended["status"] == "completed" and counts["failed"] == 0 else 1


def _summary(batch: dict[str, Any], counts: dict[str, int]) -> str:
    if batch["status"] == "failed":
        return f"{batch['id']} failed; none of its lines ran."
    said = f"{counts['completed']} of {counts['total']} lines done, {counts['failed']} failed"
    return f"{batch['id']} {batch['status']}: {said}."


def _create(client: ApiClient, body: dict[str, Any], file_id: str) -> Any:
    """The batch; where it is refused, its file is of no use."""
    try:
        return client.post("/v1/batches", body | {"input_file_id": file_id})
    except SpillwayError as error:
        if error.fault == "client":
            with contextlib.suppress(SpillwayError):
                client.send("DELETE", f"/v1/files/{file_id}")
        raise


def _save(client: ApiClient, file_id: str | None, path: Path) -> None:
    """The file under its name only once it is whole."""
    if file_id is None:
        return
    draft = path.with_name(f".{path.name}.part")
    try:
        with draft.open("wb") as sink:
            client.download(file_id, sink)
        draft.replace(path)
    except OSError as error:
        raise ClientError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        draft.unlink(missing_ok=True)
    typer.echo(f"Wrote {path}.", err=True)


def _upload(client: ApiClient, path: Path) -> Any:
    """With a progress bar where somebody watches."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    try:
        with (
            Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
            progress.open(path, "rb", description="uploading") as source,
        ):
            return client.upload(source, path.name, "batch")
    except OSError as error:
        raise ClientError(f"{path} cannot be read: {error.strerror}.") from error


def _pairs(given: list[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in ([] if given is None else given)]
    for name, separator, _ in pairs:
        if not name or not separator:
            raise ClientError(f"--metadata is KEY=VALUE, not '{name}'.")
    return {name: value for name, _, value in pairs}


def _errors(batch: dict[str, Any]) -> list[str]:
    found = [] if batch["errors"] is None else batch["errors"]["data"]
    return [
        ("" if error["line"] is None else f"line {error['line']}: ") + printable(error["message"]) for error in found
    ]


def _status(batch: dict[str, Any]) -> Text:
    return Text(batch["status"], _STYLES.get(batch["status"], ""))
