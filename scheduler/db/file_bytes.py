"""The bytes of stored files, SPILLWAY_HOME/files/<id>: written aside and renamed, so that no id names half a file.

Called by files.py. Every process that stores or reads files shares this folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import secrets
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from scheduler.errors import CapacityError, SpillwayError, StorageFull

BUFFER_BYTES = 1 << 20
DRAFT = ".part"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class FileDraft:
    """A file in the making. Nothing of it is seen under a file's id before `keep`."""

    def __init__(self, path: Path, sink: BinaryIO, reserve_bytes: int) -> None:
        self.size = 0
        self._path = path
        self._sink = sink
        self._reserve_bytes = reserve_bytes
        self._buffer = bytearray()

    async def write(self, data: bytes) -> None:
        """Append. Raises StorageFull where the disk has no room left above the reserve."""
        self.size += len(data)
        self._buffer += data
        if len(self._buffer) >= BUFFER_BYTES:
            await self._flush()

    async def keep(self, file_id: str) -> None:
        """Make it durable under its id; what lay there before is replaced."""
        await self._flush()
        with _translated():
            await asyncio.to_thread(self._settle, self._path.with_name(file_id))

    def discard(self) -> None:
        """Leave nothing behind; after `keep` there is nothing to leave."""
        with contextlib.suppress(OSError):
            self._sink.close()
        self._path.unlink(missing_ok=True)

    async def _flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        with _translated():
            await asyncio.to_thread(self._append, data)

    def _append(self, data: bytearray) -> None:
        disk = os.statvfs(self._path.parent)
        if disk.f_bavail * disk.f_frsize - len(data) < self._reserve_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._sink.write(data)

    def _settle(self, place: Path) -> None:
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.close()
        self._path.replace(place)
        folder = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class FileFolder:
    """Where the bytes lie. `reserve_bytes`: what uploads leave free for the queue and the database."""

    def __init__(self, folder: Path, reserve_bytes: int) -> None:
        self._folder = folder
        self._reserve_bytes = reserve_bytes

    def path(self, file_id: str) -> Path:
        return self._folder / file_id

    @asynccontextmanager
    async def drafting(self) -> AsyncGenerator[FileDraft]:
        """A new draft; it is gone at the end unless it was kept."""
        with _translated():
            draft = await asyncio.to_thread(self._open)
        try:
            yield draft
        finally:
            draft.discard()

    def remove(self, file_id: str) -> None:
        self.path(file_id).unlink(missing_ok=True)

    def names(self, before_s: float) -> list[str]:
        """Files and drafts that were last written before then (Unix s)."""
        if not self._folder.is_dir():
            return []
        return [entry.name for entry in os.scandir(self._folder) if _written_s(entry) < before_s]

    def _open(self) -> FileDraft:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f"{secrets.token_hex(12)}{DRAFT}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        return FileDraft(path, os.fdopen(descriptor, "wb"), self._reserve_bytes)


def _written_s(entry: os.DirEntry[str]) -> float:
    """When it was last written; one that is gone meanwhile (a draft was kept) is no old one."""
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return math.inf


@contextlib.contextmanager
def _translated() -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise _storage_error(error) from error


def _storage_error(error: OSError) -> SpillwayError:
    if error.errno in _FULL:
        return StorageFull(
            "The disk that holds the files is full; nothing was stored. Delete files, or free some space."
        )
    return CapacityError(f"The file cannot be stored now: {error.strerror}.")
