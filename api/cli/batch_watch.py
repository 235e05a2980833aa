"""Follows a batch to its end: a progress bar on a terminal, a line now and then into a pipe. Called by batch.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scheduler.errors import SpillwayError

if TYPE_CHECKING:
    from api.cli.api_client import ApiClient

POLL_S = 0.5
PLAIN_S = 10.0
PATIENCE_S = 60.0  # of a service that restarts
_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


def follow(client: ApiClient, batch_id: str) -> dict[str, Any]:
    """The batch at its end. Ctrl-C leaves it running, and says how to come back."""
    console = Console(stderr=True, highlight=False)
    try:
        return _with_bar(client, batch_id, console) if console.is_terminal else _plainly(client, batch_id)
    except KeyboardInterrupt:
        typer.echo(
            f"\n{batch_id} goes on. Come back with: spillway batch results {batch_id} --wait\n"
            f"End it with: spillway batch cancel {batch_id}",
            err=True,
        )
        raise


def _with_bar(client: ApiClient, batch_id: str, console: Console) -> dict[str, Any]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("[red]{task.fields[failed]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("validating", total=None, failed="")
        batch: dict[str, Any] = {}
        for batch in _states(client, batch_id):
            counts = batch["request_counts"]
            failed = f"{counts['failed']} failed" if counts["failed"] else ""
            ended = counts["completed"] + counts["failed"]
            total = counts["total"] if counts["total"] else None
            status = batch["status"].replace("_", " ")
            progress.update(task, description=status, completed=ended, total=total, failed=failed)
    return batch


def _plainly(client: ApiClient, batch_id: str) -> dict[str, Any]:
    said, told_s = "", 0.0
    batch: dict[str, Any] = {}
    for batch in _states(client, batch_id):
        counts = batch["request_counts"]
        line = batch["status"].replace("_", " ")
        if counts["total"]:
            line += f": {counts['completed'] + counts['failed']} of {counts['total']}"
        if line != said and (time.monotonic() - told_s >= PLAIN_S or batch["status"] in _ENDED):
            typer.echo(line, err=True)
            said, told_s = line, time.monotonic()
    return batch


def _states(client: ApiClient, batch_id: str) -> Iterator[dict[str, Any]]:
    """The batch again and again, until its end; a service that restarts is waited for."""
    reached_s = time.monotonic()
    while True:
        try:
            batch = client.get(f"/v1/batches/{batch_id}")
            reached_s = time.monotonic()
        except SpillwayError as error:
            if error.fault == "client" or time.monotonic() - reached_s > PATIENCE_S:
                raise
        else:
            yield batch
            if batch["status"] in _ENDED:
                return
        time.sleep(POLL_S)
