"""API keys: made once, shown once, kept as a hash. The API asks `verify`; the CLI creates, lists and revokes."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass

from sqlalchemy.exc import OperationalError
from sqlmodel import col, or_, select, update

from scheduler.db.models import ApiKey
from scheduler.db.session import Database
from scheduler.errors import InvalidRequest

SECRET_PREFIX = "sk-spw-"  # noqa: S105 - how every secret begins, not one
DISPLAY_CHARS = len(SECRET_PREFIX) + 6
LAST_USED_GRAIN_MS = 60_000
_SECRET = re.compile(r"sk-spw-[A-Za-z0-9_-]{43}")
_LABEL = re.compile(r"[^\x00-\x1f\x7f]{1,128}")
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as anybody may see it; `prefix` is how its secret begins. Times are Unix ms."""

    id: str
    name: str
    tenant: str
    prefix: str
    created_ms: int
    last_used_ms: int | None = None
    revoked_ms: int | None = None


class KeyStore:
    """The keys of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen_any = False

    async def create(self, name: str, tenant: str = "default") -> tuple[KeyRecord, str]:
        """A new key and its secret, which cannot be shown again. Raises InvalidRequest on a bad name or tenant."""
        _check_label(name, tenant)
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        row = ApiKey(
            id=f"key-{secrets.token_hex(8)}",
            name=name,
            tenant=tenant,
            secret_hash=_digest(secret),
            prefix=secret[:DISPLAY_CHARS],
            created_ms=_now_ms(),
        )
        async with self._database.session() as session:
            session.add(row)
            await session.commit()
        return _record(row), secret

    async def verify(self, secret: str) -> KeyRecord | None:
        """The key that this secret belongs to; None where it is unknown or revoked."""
        if _SECRET.fullmatch(secret) is None:
            return None
        digest = _digest(secret)
        async with self._database.session() as session:
            row = (await session.exec(select(ApiKey).where(ApiKey.secret_hash == digest))).one_or_none()
        if row is None or not hmac.compare_digest(row.secret_hash, digest) or row.revoked_ms is not None:
            return None
        await self._touch(row)
        return _record(row)

    async def any_keys(self) -> bool:
        """Whether a key was ever created. Revoked ones count: revoking the last key must not open the API."""
        if not self._seen_any:
            async with self._database.session() as session:
                self._seen_any = (await session.exec(select(ApiKey.id).limit(1))).first() is not None
        return self._seen_any

    async def list(self) -> tuple[KeyRecord, ...]:
        """All keys, newest first, the revoked ones too."""
        newest = select(ApiKey).order_by(col(ApiKey.created_ms).desc(), col(ApiKey.id))
        async with self._database.session() as session:
            return tuple(_record(row) for row in await session.exec(newest))

    async def revoke(self, which: str) -> KeyRecord | None:
        """Revoke by id, displayed prefix or whole secret; None where none is meant. A first revocation's time stays."""
        match = or_(col(ApiKey.id) == which, col(ApiKey.prefix) == which[:DISPLAY_CHARS])
        async with self._database.session() as session:
            rows = (await session.exec(select(ApiKey).where(match))).all()
            if len(rows) > 1:
                ids = ", ".join(row.id for row in rows)
                raise InvalidRequest(f"{len(rows)} keys begin with {which[:DISPLAY_CHARS]}: give an id ({ids}).")
            if not rows:
                return None
            row = rows[0]
            if row.revoked_ms is None:
                row.revoked_ms = _now_ms()
                session.add(row)
                await session.commit()
            return _record(row)

    async def _touch(self, row: ApiKey) -> None:
        now = _now_ms()
        if row.last_used_ms is not None and now - row.last_used_ms < LAST_USED_GRAIN_MS:
            return
        touch = update(ApiKey).where(col(ApiKey.id) == row.id).values(last_used_ms=now)
        try:
            async with self._database.session() as session:
                await session.exec(touch)
                await session.commit()
        except OperationalError:
            # Only a date is lost; a locked or full database must not turn a good key away.
            return
        row.last_used_ms = now


def _check_label(name: str, tenant: str) -> None:
    if not name.strip() or _LABEL.fullmatch(name) is None:
        raise InvalidRequest("A key's name has 1 to 128 printable characters.", param="name")
    if _TENANT.fullmatch(tenant) is None:
        raise InvalidRequest("A tenant has 1 to 64 of: letters, digits, '.', '_', '-'.", param="tenant")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _now_ms() -> int:
    return int(time.time() * 1000)


def _record(row: ApiKey) -> KeyRecord:
    return KeyRecord(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        prefix=row.prefix,
        created_ms=row.created_ms,
        last_used_ms=row.last_used_ms,
        revoked_ms=row.revoked_ms,
    )
