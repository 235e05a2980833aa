"""Stored files: their rows, and with file_bytes.py their bytes. For the routes and for batches.

The bytes come before the row and go after it, so that a row always has its bytes; bytes without a row are swept.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import delete
from sqlmodel import col, or_, select
from sqlmodel.ext.asyncio.session import AsyncSession

from scheduler.db.file_bytes import FileDraft, FileFolder
from scheduler.db.models import StoredFile
from scheduler.db.session import Database
from scheduler.settings import Settings

BATCH_FILE_LIFE_MS = 30 * 24 * 3600 * 1000
STRAY_AGE_S = 6 * 3600  # bytes without a row: an upload in progress, or one whose process died
STEP_ROWS = 200


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One stored file; times are Unix ms, `expires_ms` None: kept until it is deleted."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_ms: int
    expires_ms: int | None = None


def new_file_id(now_ms: int) -> str:
    """`file-<time><random>`: sorts by creation time, cannot be guessed (80 random bits)."""
    return f"file-{now_ms:011x}{secrets.token_hex(10)}"


class FileStore:
    """The files of one home. A file past its expiry does not exist any more, also before it is swept."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._folder = FileFolder(settings.home / "files", settings.disk_reserve_bytes)

    def drafting(self) -> AbstractAsyncContextManager[FileDraft]:
        """A draft to write to, then `save`; left unsaved, it is discarded."""
        return self._folder.drafting()

    async def save(self, draft: FileDraft, record: FileRecord) -> None:
        """The draft becomes a file. Raises StorageFull; then nothing of it is left."""
        await draft.keep(record.id)
        async with self._database.session() as session:
            session.add(StoredFile(**asdict(record)))
            try:
                await session.flush()
            except BaseException:
                self._folder.remove(record.id)
                raise
            # Whether a commit that fails has come to pass is not known: its bytes stay, and are swept if need be.
            await session.commit()

    def path(self, file_id: str) -> Path:
        return self._folder.path(file_id)

    async def get(self, file_id: str, now_ms: int) -> FileRecord | None:
        async with self._database.session() as session:
            row = await session.get(StoredFile, file_id)
        if row is None or (row.expires_ms is not None and row.expires_ms <= now_ms):
            return None
        return _record(row)

    async def list(
        self,
        tenant: str | None,
        now_ms: int,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 100,
        ascending: bool = False,
    ) -> list[FileRecord]:
        """A page of one tenant's files (None: of all), newest first unless `ascending`; `after` is a file's id."""
        key = col(StoredFile.id)
        page = select(StoredFile).order_by(key.asc() if ascending else key.desc()).limit(limit)
        page = page.where(or_(col(StoredFile.expires_ms).is_(None), col(StoredFile.expires_ms) > now_ms))
        if tenant is not None:
            page = page.where(StoredFile.tenant == tenant)
        if purpose is not None:
            page = page.where(StoredFile.purpose == purpose)
        if after is not None:
            page = page.where(key > after if ascending else key < after)
        async with self._database.session() as session:
            return [_record(row) for row in await session.exec(page)]

    async def delete(self, file_id: str) -> bool:
        """Whether there was such a file."""
        return await self._remove([file_id]) == 1

    async def sweep(self, now_ms: int) -> int:
        """Remove expired files, and bytes that no row names; how many files that were."""
        old = select(StoredFile.id).where(col(StoredFile.expires_ms) <= now_ms).limit(STEP_ROWS)
        total = 0
        while True:
            async with self._database.session() as session:
                ids = list(await session.exec(old))
            if not ids:
                break
            total += await self._remove(ids)
        return total + await self._sweep_strays(now_ms / 1000 - STRAY_AGE_S)

    async def _sweep_strays(self, before_s: float) -> int:
        names = await asyncio.to_thread(self._folder.names, before_s)
        strays = 0
        for start in range(0, len(names), STEP_ROWS):
            some = names[start : start + STEP_ROWS]
            async with self._database.session() as session:
                known = set(await session.exec(select(StoredFile.id).where(col(StoredFile.id).in_(some))))
            for name in set(some) - known:
                self._folder.remove(name)
                strays += 1
        return strays

    async def _remove(self, ids: Sequence[str]) -> int:
        async with self._database.session() as session:
            result = await session.exec(delete(StoredFile).where(col(StoredFile.id).in_(ids)))
            await session.commit()
        for file_id in ids:
            self._folder.remove(file_id)
        return result.rowcount


async def add_file_row(session: AsyncSession, record: FileRecord) -> None:
    """The row of a file whose bytes are kept already, in the caller's transaction; one that is there stays."""
    if await session.get(StoredFile, record.id) is None:
        session.add(StoredFile(**asdict(record)))


def _record(row: StoredFile) -> FileRecord:
    return FileRecord(
        id=row.id,
        tenant=row.tenant,
        filename=row.filename,
        purpose=row.purpose,
        bytes=row.bytes,
        created_ms=row.created_ms,
        expires_ms=row.expires_ms,
    )
