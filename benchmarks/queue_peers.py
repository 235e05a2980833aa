"""Environments of peers that cannot share ours, made when asked for. Of the queues: arq needs redis-py < 6, Celery a
newer one.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = (
    "celery==5.7.0",
    "hiredis==3.5.0",
    "packaging==26.3",
    "redis==8.1.0",
    "saq==0.26.4",
    "taskiq==0.13.0",
    "taskiq-redis==1.2.4",
    "uvloop==0.23.0",
)


def peers_python() -> str:
    """The interpreter of the queues' environment."""
    return python_with(PACKAGES)


def python_with(packages: tuple[str, ...], alone: tuple[str, ...] = ()) -> str:
    """The interpreter of an environment below the temporary folder with `packages`, and with those `alone` without
    what they say they need; installs them where it is new.
    """
    tag = hashlib.sha256(" ".join((sys.version, *packages, *alone)).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"spillway-bench-peers-{tag}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        uv = _uv()
        print(f"installing the peers into {folder} (once)", file=sys.stderr)
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(python)]
        subprocess.run([*install, *packages], check=True)
        if alone:
            subprocess.run([*install, "--no-deps", *alone], check=True)
        (folder / "complete").touch()
    return str(python)


def _uv() -> str:
    """As the Makefile finds it: on PATH, else in our environment."""
    beside = Path(sys.executable).parent / "uv"
    return shutil.which("uv") or str(beside)
