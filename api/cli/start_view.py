"""What the terminal shows while `spillway up` starts and stops: one line per part on a terminal, nothing elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

State = Literal["working", "done", "failed"]


class SteadyConsole(Console):
    """A console whose reader may go away (`spillway up | head`): rich would end the process."""

    def on_broken_pipe(self) -> None:
        return


@dataclass(slots=True)
class Part:
    """One line of the display."""

    name: str
    state: State
    detail: str = ""


class StartView:
    """A live list of parts; `doing` tells what a working part said last."""

    def __init__(self, console: Console, doing: Callable[[str], str]) -> None:
        self._console = console
        self._doing = doing
        self._parts: dict[str, Part] = {}
        self._spinner = Spinner("dots", style="cyan")
        self._began_s = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=10, transient=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last state on the screen; idempotent. A terminal that was closed is no reason to fail."""
        with contextlib.suppress(OSError):
            self._live.stop()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def working(self, name: str, detail: str = "") -> None:
        self._parts[name] = Part(name, "working", detail)

    def done(self, name: str, detail: str = "") -> None:
        self._parts[name] = Part(name, "done", detail)

    def fail_rest(self) -> None:
        """Whatever was still under way has failed."""
        for part in self._parts.values():
            if part.state == "working":
                part.state = "failed"

    def has_spoken(self, name: str) -> bool:
        """Whether the part has logged anything yet."""
        return bool(self._doing(name))

    def is_done(self, name: str) -> bool:
        return name in self._parts and self._parts[name].state == "done"

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2), pad_edge=True)
        table.add_column(no_wrap=True)
        table.add_column(min_width=10)
        table.add_column(overflow="ellipsis", no_wrap=True, style="dim")
        for part in self._parts.values():
            table.add_row(self._mark(part.state), part.name, Text(self._words(part)))
        return table

    def _words(self, part: Part) -> str:
        return part.detail or (self._doing(part.name) if part.state == "working" else "")

    def _mark(self, state: State) -> RenderableType:
        match state:
            case "working":
                return self._spinner
            case "done":
                return Text("✓", style="green")
            case "failed":
                return Text("✗", style="red")
