"""What happened when, for whoever debugs a run: a line per fault, death, start and oddity, in memory and in a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TextIO


class Timeline:
    """`show`: also print each line. Seconds count from the object's making until `zero` is called, then from there."""

    def __init__(self, path: Path, *, show: bool) -> None:
        self.path = path
        self.lines: list[str] = []
        self._began = time.monotonic()
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._show = show

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._began

    def zero(self) -> None:
        """The faults begin now."""
        self._began = time.monotonic()

    def note(self, kind: str, text: str) -> None:
        line = f"{self.now_s:8.3f} {kind:<8} {text}"
        self.lines.append(line)
        self._file.write(line + "\n")
        self._file.flush()
        if self._show:
            print(line, flush=True)

    def of(self, *kinds: str) -> list[str]:
        """The lines of some kinds."""
        return [line for line in self.lines if line.split()[1] in kinds]

    def close(self) -> None:
        self._file.close()
