"""The environment of an engine process: which BLAS, how many threads, where temporary files go. Called by local.py."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import psutil

from scheduler.settings import Settings

# Where Debian, Fedora and Arch put an OpenBLAS that answers to the name of the reference BLAS; Linux wheels of MLX
# carry only that reference BLAS, which is an order of magnitude slower.
_BLAS_NAMES = (
    "{arch}-linux-gnu/openblas-pthread/libblas.so.3",
    "{arch}-linux-gnu/openblas-openmp/libblas.so.3",
    "{arch}-linux-gnu/libopenblas.so.0",
    "libopenblas.so.0",
    "libopenblasp.so.0",
)
_LIBRARY_ROOTS = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib")
_TEMPORARY_PREFIX = "engine-"


def system_openblas() -> Path | None:
    """The machine's OpenBLAS, where MLX would profit from it (Linux), else None."""
    if sys.platform != "linux":
        return None
    names = [name.format(arch=platform.machine()) for name in _BLAS_NAMES]
    candidates = (Path(root) / name for name in names for root in _LIBRARY_ROOTS)
    return next((path for path in candidates if path.exists()), None)


def engine_environment(settings: Settings, temporary: Path, engines: int) -> dict[str, str]:
    """Variables for one of `engines` engine processes on this machine; `temporary` is its own directory."""
    environment = {**os.environ, **settings.as_environment()}
    environment.pop("SPILLWAY_PARENT_PIPE", None)
    environment["TMPDIR"] = str(temporary)
    environment["PYTHONSAFEPATH"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    threads = settings.engine_threads
    if threads is None:
        threads = max(1, (os.cpu_count() or 1) // max(1, engines))
    environment["OPENBLAS_NUM_THREADS"] = str(threads)
    environment["OMP_NUM_THREADS"] = str(threads)
    blas = system_openblas() if settings.system_blas else None
    if blas is not None:
        before = environment.get("LD_PRELOAD")
        environment["LD_PRELOAD"] = str(blas) if not before else f"{blas}:{before}"
    return environment


def make_temporary(home: Path) -> Path:
    """A private directory below `home`, named after this process; those of processes that are gone are removed."""
    parent = home / "tmp"
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in parent.glob(f"{_TEMPORARY_PREFIX}*"):
        owner = left.name.removeprefix(_TEMPORARY_PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{os.getpid()}-", dir=parent))
