"""What `spillway doctor` looks at: each check is one function that returns one finding, and never raises."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from api.cli.announcement import short_path
from api.cli.home import NEEDED_BYTES, check_state_format, free_bytes
from api.cli.home_lock import holder
from api.cli.preflight import check_port
from scheduler.errors import StartupError
from scheduler.settings import Settings

Level = Literal["ok", "warn", "broken"]
OLDEST_PYTHON = (3, 11)
OLDEST_GLIBC = (2, 35)
ROOMY_BYTES = 2 * 2**30
WANTED_FILES = 1024
_PROBE_S = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one topic; `mend` says what to do where it is not ok."""

    topic: str
    level: Level
    found: str
    mend: str = ""


def python(_settings: Settings) -> Finding:
    found = f"{platform.python_version()} ({short_path(Path(sys.executable))})"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "broken", found, "Install Python 3.11 or newer and run `make up` again.")
    return Finding("python", "ok", found)


def system(_settings: Settings) -> Finding:
    """Where MLX has wheels: macOS on Apple silicon, Linux with a new enough glibc."""
    machine = platform.machine()
    if sys.platform == "darwin":
        found = f"macOS {platform.mac_ver()[0]}, {machine}"
        mend = "" if machine == "arm64" else "MLX needs Apple silicon and an arm64 Python."
        return Finding("system", "ok" if not mend else "broken", found, mend)
    library, number = platform.libc_ver()
    found = f"{platform.system()} {machine}, {library or 'no glibc'} {number}".rstrip()
    parts = tuple(int(part) for part in number.split(".")[:2] if part.isdigit())
    if library != "glibc" or parts < OLDEST_GLIBC:
        return Finding(
            "system", "broken", found, "MLX needs glibc 2.35 or newer, as Ubuntu 22.04 or Debian 12 have it."
        )
    return Finding("system", "ok", found)


def mlx(_settings: Settings) -> Finding:
    """Imported and used in a process of its own: a broken build may crash it."""
    code = "import mlx.core as mx; mx.eval(mx.ones(2) + 1); print(mx.__version__, mx.default_device())"
    probe = _python_says(code)
    if probe.trouble is not None:
        return Finding("mlx", "broken", probe.trouble, "Remove .venv and run `make up` again.")
    return Finding("mlx", "ok", probe.said)


def compiler(_settings: Settings) -> Finding | None:
    """On CPU, mx.compile builds its kernels with g++."""
    if sys.platform == "darwin":
        return None
    found = shutil.which("g++")
    if found is None:
        mend = "Decoding is slower without it: `apt-get install g++`."
        return Finding("g++", "warn", "not found", mend)
    return Finding("g++", "ok", found)


def blas(settings: Settings) -> Finding | None:
    """The wheel of mlx[cpu] carries the slow reference BLAS; OpenBLAS is many times faster. The worker looks for it."""
    if sys.platform == "darwin":
        return None
    found = _python_says("from workers.engine_environment import system_openblas; print(system_openblas() or '')").said
    if not found:
        mend = "Prompts are read several times faster with OpenBLAS: `apt-get install libopenblas0-pthread`."
        return Finding("BLAS", "warn", "the wheel's own", mend)
    if not settings.system_blas:
        return Finding("BLAS", "ok", "the wheel's own, as SPILLWAY_SYSTEM_BLAS=false says")
    return Finding("BLAS", "ok", found)


def disk(settings: Settings) -> Finding:
    place = next(path for path in (settings.home, *settings.home.parents) if path.exists())
    free = free_bytes(place)
    found = f"{free / 2**30:.1f} GB free"
    if free < NEEDED_BYTES:
        return Finding(
            "disk", "broken", found, f"Free some space on the disk of {short_path(place)}, or set SPILLWAY_HOME."
        )
    if free < ROOMY_BYTES:
        return Finding("disk", "warn", found, "Models of any size will not fit; free some space.")
    return Finding("disk", "ok", found)


def home(settings: Settings) -> Finding:
    path = settings.home
    shown = short_path(path)
    if not path.exists():
        return Finding("home", "ok", f"{shown} (made by the first `spillway up`)")
    try:
        status = path.stat()
        check_state_format(path)
    except StartupError as error:
        return Finding("home", "broken", shown, error.message)
    if status.st_uid != os.geteuid() or not os.access(path, os.W_OK):
        return Finding("home", "broken", f"{shown} belongs to another user", f"`chown -R $(id -u) {shown}`")
    if stat.S_IMODE(status.st_mode) & 0o077:
        mend = f"Others on this machine can read your prompts: `chmod 700 {shown}`"
        return Finding("home", "warn", f"{shown} is open to others", mend)
    return Finding("home", "ok", shown)


def open_files(_settings: Settings) -> Finding:
    """Every stream is a file; macOS starts with 256."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < WANTED_FILES:
        return Finding("open files", "warn", f"at most {soft}", "Many streams need more: `ulimit -n 4096`.")
    return Finding("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def demo_model(_settings: Settings) -> Finding:
    import scheduler

    weights = Path(scheduler.__file__).parent.parent / "workers" / "demo_model" / "weights"
    found = sorted(weights.glob("*.safetensors"))
    if not found:
        return Finding(
            "demo model", "broken", "its weights are missing", "Clone the repository again, with its large files."
        )
    return Finding("demo model", "ok", f"{sum(path.stat().st_size for path in found) / 2**20:.1f} MB")


def model_cache(_settings: Settings) -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    models = sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*"))
    place = next(path for path in (cache, *cache.parents) if path.exists())
    if not os.access(place, os.W_OK):
        return Finding(
            "model cache", "warn", f"{short_path(cache)} cannot be written", "Set HF_HOME to a directory of yours."
        )
    return Finding("model cache", "ok", f"{short_path(cache)}: {', '.join(models) or 'empty'}")


def running(settings: Settings) -> Finding:
    found = holder(settings.home)
    return Finding("running", "ok", "nothing" if found is None else f"{found.address} (pid {found.pid})")


def port(settings: Settings) -> Finding:
    shown = f"{settings.host}:{settings.port}"
    found = holder(settings.home)
    if found is not None and found.address.endswith(f":{settings.port}"):
        return Finding("port", "ok", f"{shown} is ours")
    try:
        check_port(settings.host, settings.port)
    except StartupError as error:
        return Finding("port", "warn", f"{shown} is not free", error.message)
    return Finding("port", "ok", f"{shown} is free")


@dataclass(frozen=True, slots=True)
class Probe:
    """What a process of its own said, or its last word of trouble."""

    said: str
    trouble: str | None = None


def _python_says(code: str) -> Probe:
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Probe("", f"no answer within {_PROBE_S:g} s")
    if done.returncode == 0:
        return Probe(done.stdout.strip())
    words = done.stderr.strip().splitlines()
    return Probe("", words[-1] if words else f"it ended with status {done.returncode}")
