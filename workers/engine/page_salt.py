"""Whose KV a page is: a text over everything that decides it besides the tokens. Called once per load.

The weights (every file's name, size, time and a sample of its bytes), the configuration, the adapter, the dtype, and
the versions of what computes. The sample catches weights retrained into files of the same size; the time catches the
rest. A model that is copied elsewhere or fetched again starts with an empty disk tier, which costs time and no answer.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

_FORMAT = "1"
_SAMPLES = 16
_SAMPLE_BYTES = 4096
_DECIDING = ("*.safetensors", "*.json")


def model_salt(path: Path, dtype: str, adapter: Path | None = None) -> str | None:
    """The salt of the model in this directory; None where there are no weight files to know it by."""
    places = [path] if adapter is None else [path, adapter]
    if not all(next(place.glob("*.safetensors"), None) for place in places):
        return None
    total = hashlib.blake2b(digest_size=16)
    for part in (_FORMAT, dtype, version("mlx"), version("mlx-lm")):
        total.update(f"{part}\0".encode())
    for place in places:
        for file in sorted({file for pattern in _DECIDING for file in place.glob(pattern)}):
            _add_file(total, file)
        total.update(b"\0\0")
    return total.hexdigest()


def _add_file(total: hashlib.blake2b, file: Path) -> None:
    status = file.stat()
    whole = file.suffix == ".json" and status.st_size < 1 << 20
    total.update(f"{file.name}\0{status.st_size}\0{0 if whole else status.st_mtime_ns}\0".encode())
    with file.open("rb") as stream:
        if whole:
            total.update(stream.read())
            return
        for sample in range(_SAMPLES):
            stream.seek(max(0, status.st_size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            total.update(stream.read(_SAMPLE_BYTES))
