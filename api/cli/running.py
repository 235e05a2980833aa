"""`spillway status` and `spillway stop`: the `up` that runs on a home, found by its lock and its note."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from datetime import timedelta

import httpx2
import msgspec
import typer
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table

from api.cli.announcement import short_path
from api.cli.home_lock import Holder, holder
from api.cli.run_file import ProcessNote, RunNote, is_running, process_started_s, read_run_note
from scheduler.errors import QueueUnavailable, StartupError
from scheduler.queue.connection import connect
from scheduler.queue.fleet import Fleet
from scheduler.queue.job_queue import JobQueue
from scheduler.settings import Settings

NOT_RUNNING = 3
# Two stages may take the whole drain time, and each child some seconds to put its things away.
_STOP_MARGIN_S = 30.0


class WorkerLine(msgspec.Struct, frozen=True):
    """What a worker does now."""

    worker: str
    models: tuple[str, ...]
    busy_rows: int
    max_rows: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `spillway status` knows; `waiting` counts jobs that no worker has claimed."""

    running: bool
    address: str
    pid: int
    version: str = ""
    uptime_s: float = 0.0
    ready: bool = False
    processes: dict[str, str]
    workers: tuple[WorkerLine, ...] = ()
    waiting: int | None = None


def show_status(settings: Settings, *, as_json: bool) -> int:
    """Print what runs; the exit status."""
    found = holder(settings.home)
    if found is None:
        typer.echo('{"running":false}' if as_json else f"Nothing runs on {short_path(settings.home)}.")
        return NOT_RUNNING
    report = asyncio.run(_report(settings, found))
    if as_json:
        typer.echo(msgspec.json.encode(report))
    else:
        _print(settings, report)
    return 0


def stop_running(settings: Settings) -> None:
    """SIGTERM to the `up` that holds the lock, and wait until it let go; raises StartupError where it does not."""
    found = holder(settings.home)
    if found is None:
        typer.echo(f"Nothing runs on {short_path(settings.home)}.")
        return
    process = ProcessNote("up", found.pid, process_started_s(found.pid))
    with contextlib.suppress(ProcessLookupError):
        os.kill(found.pid, signal.SIGTERM)
    within_s = 2 * settings.drain_s + _STOP_MARGIN_S
    deadline = time.monotonic() + within_s
    while is_running(process):
        if time.monotonic() > deadline:
            raise StartupError(
                f"Spillway (pid {found.pid}) has not stopped within {within_s:g} s; its logs may say why."
            )
        time.sleep(0.1)
    typer.echo(f"Stopped (pid {found.pid}).")


async def _report(settings: Settings, found: Holder) -> Report:
    note = read_run_note(settings.home)
    if note is None or note.pid != found.pid:  # between the lock and the first child
        return Report(running=True, address=found.address, pid=found.pid, processes={})
    workers, waiting = await _work(settings, note)
    return Report(
        running=True,
        address=found.address,
        pid=found.pid,
        version=note.version,
        uptime_s=round(time.time() - note.started_s, 1),
        ready=note.ready and await _answers(found.address),
        processes={process.name: _health(process) for process in note.processes},
        workers=workers,
        waiting=waiting,
    )


async def _work(settings: Settings, note: RunNote) -> tuple[tuple[WorkerLine, ...], int | None]:
    names = {process.pid: process.name for process in note.processes}
    try:
        redis = connect(settings, "command")
    except QueueUnavailable:
        return (), None
    try:
        found = await Fleet(redis, settings).workers()
        waiting = sum((await JobQueue(redis, settings).depths()).values())
    except (QueueUnavailable, RedisError):
        return (), None
    finally:
        await redis.aclose()
    lines = [
        WorkerLine(names.get(worker.pid, worker.id), worker.models, worker.busy_rows, worker.max_rows)
        for worker in found
    ]
    return tuple(sorted(lines, key=lambda line: (line.worker, line.models))), waiting


async def _answers(address: str) -> bool:
    async with httpx2.AsyncClient(base_url=address, timeout=2.0, trust_env=False) as client:
        try:
            return (await client.get("/readyz")).status_code == httpx2.codes.OK
        except httpx2.TransportError:
            return False


def _health(process: ProcessNote) -> str:
    state = f"pid {process.pid}" if is_running(process) else "down, starting again"
    return f"{state}, restarted {process.restarts}×" if process.restarts else state


def _print(settings: Settings, report: Report) -> None:
    console = Console(highlight=False)
    state = "[bold green]ready[/]" if report.ready else "[bold yellow]not ready[/]"
    console.print(f"Spillway {report.version} is {state}: [bold]{report.address}[/]")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_row("up", f"{timedelta(seconds=int(report.uptime_s))} (pid {report.pid})")
    table.add_row("home", short_path(settings.home))
    for name, health in report.processes.items():
        table.add_row(name, ", ".join([health, *_busy(report, name)]))
    table.add_row("waiting", "Redis does not answer" if report.waiting is None else f"{report.waiting} jobs")
    console.print(table)


def _busy(report: Report, name: str) -> list[str]:
    lines = [line for line in report.workers if line.worker == name]
    return [f"{', '.join(line.models)}: {line.busy_rows} of {line.max_rows} rows busy" for line in lines]
