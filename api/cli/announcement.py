"""What `spillway up` says when it is ready: where it is, a line to try, and how to go on."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from scheduler.settings import Settings

_QUESTION = (
    '{"model": "default", "messages": [{"role": "user", "content": "Repeat after me: seven grey herons, 42 pebbles"}]}'
)


def print_announcement(
    console: Console, settings: Settings, address: str, models: tuple[str, ...], *, needs_key: bool
) -> None:
    """Plain text where stdout is no terminal; the curl line is one line, whatever the width."""
    command = command_name()
    if console.is_terminal:
        console.print()
    console.print(Text.assemble(("Spillway is ready: ", "bold green"), (address, "bold")), soft_wrap=True)
    lines = [
        "",
        f"  {try_line(address, needs_key=needs_key)}",
        "",
        f"  {command} chat      talk to it in this terminal",
        f"  {command} status    what runs, and how it does",
        "",
        Text(f"  Serving {', '.join(models)}. Logs are in {short_path(settings.home / 'logs')}. Ctrl-C stops.", "dim"),
        "",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def try_line(address: str, *, needs_key: bool) -> str:
    """A curl command to paste; where a key was made, the shell fills it in."""
    key = ' -H "Authorization: Bearer $SPILLWAY_API_KEY"' if needs_key else ""
    return f"curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{_QUESTION}'"


def command_name() -> str:
    """How this user calls `spillway` from here."""
    found = shutil.which("spillway")
    own = Path(sys.executable).parent / "spillway"
    if found is not None and Path(found).resolve() == own.resolve():
        return "spillway"
    return short_path(own)


def short_path(path: Path) -> str:
    """The path as a person would write it: relative to here, or to the home directory."""
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base):
            return f"{prefix}{path.relative_to(base)}"
    return str(path)
