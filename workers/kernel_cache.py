"""Keeps the libraries that mx.compile builds on Linux, so that only the first start of a model waits for the compiler.

MLX builds into TMPDIR and loads what it finds there, half-written files too; so each engine has a TMPDIR of its own,
seeded from `home/cache/kernels` before it starts, and what it built is kept once it is ready, when nothing is being
written. Files appear in the cache whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from pathlib import Path

from scheduler.telemetry import get_logger

_log = get_logger(__name__)
_LIBRARIES = "mlx/*/cpu/lib*.so"


def seed(home: Path, temporary: Path) -> int:
    """Copy what earlier engines built into a new TMPDIR; returns how many libraries."""
    return _copy_missing(_cache(home), temporary)


def keep(home: Path, temporary: Path) -> int:
    """Copy what this engine built into the cache; call while it compiles nothing. A full disk costs only the speed."""
    try:
        return _copy_missing(temporary, _cache(home))
    except OSError as error:
        _log.warning("cannot keep compiled kernels", reason=str(error))
        return 0


def _cache(home: Path) -> Path:
    return home / "cache" / "kernels" / platform.machine()


def _copy_missing(source: Path, target: Path) -> int:
    copied = 0
    for library in source.glob(_LIBRARIES):
        place = target / library.relative_to(source)
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = place.with_name(f"partial-{os.getpid()}")  # a library's own name may be as long as names can be
        try:
            shutil.copyfile(library, partial)
            partial.replace(place)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()
        copied += 1
    return copied
