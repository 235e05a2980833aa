"""API keys, on both databases."""

from __future__ import annotations

import pytest
from sqlmodel import select

from scheduler.db.keys import KeyStore
from scheduler.db.models import ApiKey
from scheduler.db.session import Database
from scheduler.errors import InvalidRequest


async def test_a_secret_is_accepted_and_only_its_hash_is_stored(database: Database) -> None:
    store = KeyStore(database)
    record, secret = await store.create("laptop")
    assert secret.startswith("sk-spw-") and len(secret) == 50 and secret.startswith(record.prefix)
    verified = await store.verify(secret)
    assert verified is not None and verified.id == record.id and verified.tenant == "default"
    async with database.session() as session:
        row = (await session.exec(select(ApiKey))).one()
    assert secret not in repr(row) and secret.removeprefix("sk-spw-") not in repr(row)


@pytest.mark.parametrize("change", ["last character", "case", "cut", "longer", "empty", "not ascii"])
async def test_a_secret_that_differs_anywhere_is_refused(database: Database, change: str) -> None:
    store = KeyStore(database)
    _, secret = await store.create("laptop")
    wrong = {
        "last character": secret[:-1] + ("a" if secret[-1] != "a" else "b"),
        "case": secret.swapcase(),
        "cut": secret[:-1],
        "longer": secret + "a",
        "empty": "",
        "not ascii": secret[:-1] + "é",
    }[change]
    assert await store.verify(wrong) is None
    assert await store.verify(secret) is not None


async def test_a_revoked_key_is_refused_and_keeps_the_api_closed(database: Database) -> None:
    store = KeyStore(database)
    assert not await store.any_keys()
    record, secret = await store.create("laptop")
    kept, kept_secret = await store.create("desktop", tenant="team-a")
    revoked = await store.revoke(record.id)
    assert revoked is not None and revoked.revoked_ms is not None
    assert await store.verify(secret) is None
    verified = await store.verify(kept_secret)
    assert verified is not None and verified.tenant == "team-a"
    await store.revoke(kept.id)
    assert await KeyStore(database).any_keys()


async def test_revoking_twice_keeps_the_first_time_and_accepts_prefix_or_secret(database: Database) -> None:
    store = KeyStore(database)
    record, secret = await store.create("laptop")
    first = await store.revoke(record.prefix)
    again = await store.revoke(secret)
    assert first is not None and again == first
    assert await store.revoke("key-unknown") is None


async def test_a_prefix_that_two_keys_share_is_refused(database: Database) -> None:
    store = KeyStore(database)
    record, _ = await store.create("laptop")
    async with database.session() as session:
        session.add(
            ApiKey(id="key-twin", name="t", tenant="t", secret_hash="0" * 64, prefix=record.prefix, created_ms=1)
        )
        await session.commit()
    with pytest.raises(InvalidRequest, match="give an id"):
        await store.revoke(record.prefix)
    assert [key.revoked_ms for key in await store.list()] == [None, None]


async def test_last_used_is_written_once_a_minute_only(database: Database) -> None:
    store = KeyStore(database)
    record, secret = await store.create("laptop")
    assert record.last_used_ms is None
    first = await store.verify(secret)
    second = await store.verify(secret)
    assert first is not None and second is not None
    assert first.last_used_ms == second.last_used_ms is not None
    assert [key.last_used_ms for key in await store.list()] == [first.last_used_ms]


@pytest.mark.parametrize(("name", "tenant"), [("", "t"), ("a\nb", "t"), ("x" * 129, "t"), ("ok", "a b"), ("ok", "")])
async def test_a_name_that_a_terminal_or_a_key_could_not_show_is_refused(
    database: Database, name: str, tenant: str
) -> None:
    with pytest.raises(InvalidRequest):
        await KeyStore(database).create(name, tenant)
    assert not await KeyStore(database).any_keys()
