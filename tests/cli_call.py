"""A `spillway` command in the test's own process, where a new one computes for a second before it says anything."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from api.cli import main
from tests.api_stage import Stage


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def spillway(stage: Stage, *arguments: str | Path, columns: int | None = None) -> Done:
    """A command that talks to this stage's API, whose log is left out."""
    return call(*arguments, "--url", stage.url, columns=columns)


def call(*arguments: str | Path, columns: int | None = None) -> Done:
    """Into a pipe, or with `columns` onto a terminal that wide."""
    out, err = _Output(columns is not None), _Output(columns is not None)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), capture_logs():
        patch.setattr(sys, "argv", ["spillway", *map(str, arguments)])
        if columns is not None:
            patch.setenv("COLUMNS", str(columns))
            patch.setenv("TERM", "xterm")
            patch.setenv("NO_COLOR", "1")
        with pytest.raises(SystemExit) as left:
            main()
    code = left.value.code
    if isinstance(code, str):
        return Done(1, out.said(), f"{err.said()}{code}\n")
    return Done(0 if code is None else code, out.said(), err.said())


class _Output(io.TextIOWrapper):
    """Text and bytes into memory."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def said(self) -> str:
        held = self.buffer
        assert isinstance(held, io.BytesIO)
        return held.getvalue().decode()
