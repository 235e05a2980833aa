"""Jobs, queues and dead letters as the commands print them: tables, details, moments and durations."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from api.cli.plain_text import printable

_STYLES = {"running": "cyan", "succeeded": "green", "failed": "red", "expired": "red", "cancelled": "dim"}
_NOT_YET = "–"


def plain_table(*columns: str) -> Table:
    """A table without lines; no cell is wrapped, so that a pipe gets one line per row."""
    table = Table(*columns, box=None, header_style="dim", pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    return table


def job_table(jobs: list[dict[str, Any]], *, with_priority: bool) -> Table:
    table = plain_table("job", "state", "model", "age", "tokens", "took", *(["priority"] if with_priority else []))
    for job in jobs:
        usage = job["usage"] or {}
        took = duration(job["timings"]["total_ms"])
        tokens = str(usage.get("completion_tokens", _NOT_YET))
        age = duration(time.time() * 1000 - job["created_ms"])
        cells = [job["id"], _state(job), job["model"], age, tokens, took]
        table.add_row(*cells, *([job["priority"]] if with_priority else []))
    return table


def job_details(job: dict[str, Any]) -> Table:
    usage, timings = job["usage"] or {}, job["timings"]
    rows: list[tuple[str, Any]] = [
        ("job", job["id"]),
        ("state", _state(job)),
        ("model", job["model"]),
        ("priority", job["priority"]),
        ("tenant", job["tenant"]),
        ("created", moment(job["created_ms"])),
        *_order(job),
        ("waited", duration(timings["queued_ms"])),
        ("first token", duration(timings["first_token_ms"])),
        ("took", duration(timings["total_ms"])),
    ]
    rows += [(f"attempt {attempt['attempt']}", attempt["worker"]) for attempt in job["attempts"]]
    if usage:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        rows.append(("tokens", f"{usage['prompt_tokens']} in ({cached} cached), {usage['completion_tokens']} out"))
    if job["error"] is not None:
        rows.append(("error", Text(f"{job['error']['code']}: {printable(job['error']['message'] or '')}", "red")))
    return details(rows)


def details(rows: list[tuple[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for name, value in rows:
        table.add_row(name, value)
    return table


def moment(moment_ms: int) -> str:
    return datetime.fromtimestamp(moment_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(ms: float | None) -> str:
    if ms is None:
        return _NOT_YET
    seconds = ms / 1000
    if seconds < 1:
        return f"{ms:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _state(job: dict[str, Any]) -> Text:
    return Text(job["state"], _STYLES.get(job["state"], ""))


def _order(job: dict[str, Any]) -> list[tuple[str, Any]]:
    """What was asked for beside the inference itself; only what was."""
    names = {"batch_id": "batch", "custom_id": "custom id", "schedule_id": "schedule", "webhook": "webhook"}
    rows = [(shown, Text(printable(job[name]))) for name, shown in names.items() if job.get(name) is not None]
    times = {"not_before_ms": "not before", "deadline_ms": "deadline"}
    rows += [(shown, Text(moment(job[name]))) for name, shown in times.items() if job.get(name) is not None]
    rows += [(printable(key), Text(printable(value))) for key, value in (job.get("metadata") or {}).items()]
    return rows
