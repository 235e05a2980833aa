"""`spillway doctor`: every finding on one line, with its mend where one is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from api.cli import findings, store_findings
from api.cli.findings import Finding, Level
from api.cli.plain_text import wide_console
from scheduler.settings import Settings

_MARKS: dict[Level, tuple[str, str]] = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "broken": ("✗", "red")}
_CHECKS: tuple[Callable[[Settings], Finding | None], ...] = (
    findings.python,
    findings.system,
    findings.mlx,
    findings.blas,
    findings.compiler,
    store_findings.redis_server,
    store_findings.database,
    findings.home,
    findings.disk,
    findings.open_files,
    findings.demo_model,
    findings.model_cache,
    findings.port,
    findings.running,
)


def run_doctor(settings: Settings, *, as_json: bool) -> int:
    """Print all findings; the exit status is 1 where something is broken."""
    console = Console(highlight=False)
    # Its spinner draws on a terminal only.
    with Console(stderr=True).status("Looking around…"):
        found = [finding for check in _CHECKS if (finding := check(settings)) is not None]
    broken = sum(finding.level == "broken" for finding in found)
    if as_json:
        typer.echo(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in found]}))
    else:
        wide_console().print(_table(found))
        console.print(_verdict(broken, sum(finding.level == "warn" for finding in found)))
    return 1 if broken else 0


def _table(found: list[Finding]) -> Table:
    table = Table.grid(padding=(0, 2))
    for finding in found:
        mark, style = _MARKS[finding.level]
        words = Text(finding.found)
        if finding.mend:
            words.append(f"\n{finding.mend}", style)
        table.add_row(Text(mark, style), Text(finding.topic, "dim"), words)
    return table


def _verdict(broken: int, warnings: int) -> Text:
    if broken:
        return Text(f"\n{broken} broken, {warnings} could be better.", "bold red")
    if warnings:
        return Text(f"\nAll that is needed is there; {warnings} could be better.", "bold")
    return Text("\nAll is well.", "bold green")
