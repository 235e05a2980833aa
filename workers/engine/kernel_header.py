"""Precompiles the header that all of MLX's kernels on Linux CPU include, while Python still imports the rest.

MLX runs `g++` once per kernel, half a second each, nearly all of it for that header. A `g++` of our own, first in PATH,
adds the directory with the precompiled one. g++ takes it only where it fits; until then, and without it, nothing
changes but the time.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from scheduler.telemetry import get_logger

_log = get_logger(__name__)

_HEADER = Path("mlx/backend/cpu/compiled_preamble.h")
_LIKE_MLX = ("-std=c++17", "-O3", "-Wall", "-fPIC")  # MLX's own options; others would make it unfit
_LONGEST_S = 60.0


def precompile() -> threading.Thread | None:
    """Begin, where this process will have to build kernels; None where it will not. Changes this process's PATH."""
    compiler, include = shutil.which("g++"), _include_directory()
    temporary = Path(tempfile.gettempdir())
    if sys.platform != "linux" or compiler is None or include is None or _has_kernels(temporary):
        return None
    directory = Path(tempfile.mkdtemp(prefix="kernel-header-", dir=temporary))
    target = directory / _HEADER.with_suffix(".h.gch")
    target.parent.mkdir(parents=True)
    shim = directory / "bin" / "g++"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} -I{shlex.quote(str(directory))} "$@"\n')
    shim.chmod(0o700)
    os.environ["PATH"] = f"{shim.parent}{os.pathsep}{os.environ['PATH']}"
    building = threading.Thread(target=_build, args=(compiler, include, target), name="kernel-header", daemon=True)
    building.start()
    return building


def _build(compiler: str, include: Path, target: Path) -> None:
    partial = target.with_suffix(".partial")  # a kernel must not meet half of it
    source = ("-x", "c++-header", str(include / _HEADER))
    command = [compiler, *_LIKE_MLX, f"-I{include}", *source, "-o", str(partial)]
    try:
        subprocess.run(  # noqa: S603 - the compiler found above, with options of our own
            command, check=True, capture_output=True, timeout=_LONGEST_S, stdin=subprocess.DEVNULL
        )
        partial.replace(target)
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("kernels are built without a precompiled header", reason=str(error))


def _has_kernels(temporary: Path) -> bool:
    return next(temporary.glob("mlx/*/cpu/lib*.so"), None) is not None


def _include_directory() -> Path | None:
    """Where the installed MLX keeps its headers; found without importing it."""
    package = importlib.util.find_spec("mlx")
    places = [] if package is None else [Path(place) / "include" for place in package.submodule_search_locations or ()]
    return next((place for place in places if (place / _HEADER).is_file()), None)
