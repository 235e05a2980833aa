"""`spillway keys`: make, list and revoke API keys, straight in the database, so that the first one needs no key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from api.cli.home import make_home
from api.cli.options import Home, Json, settings_with
from api.cli.plain_text import wide_console
from scheduler.errors import ClientError
from scheduler.settings import Settings

if TYPE_CHECKING:
    from scheduler.db.keys import KeyRecord, KeyStore

app = typer.Typer(
    help="API keys. While none was ever made, the API is open, and on this machine only.", no_args_is_help=True
)

T = TypeVar("T")


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Whose or what for.")] = "default",
    tenant: Annotated[str, typer.Option(help="Who shares the machine fairly with whom.")] = "default",
    if_none: Annotated[bool, typer.Option("--if-none", help="Do nothing where a key was made before.")] = False,
    home: Home = None,
) -> None:
    """Make a key. It is shown once; piped, only the key itself is printed."""

    async def act(store: KeyStore) -> tuple[KeyRecord, str] | None:
        if if_none and await store.any_keys():
            return None
        return await store.create(name, tenant)

    console = Console(highlight=False)
    made = _with_store(settings_with(home=home), act)
    if made is None:
        Console(stderr=True, highlight=False).print("A key was made before; nothing to do.")
        return
    record, secret = made
    if not console.is_terminal:
        typer.echo(secret)
        return
    console.print(
        f"Key [bold]{record.id}[/] for {record.name!r}, tenant {record.tenant}:\n\n  [bold green]{secret}[/]\n"
    )
    console.print("It is shown only now: Spillway keeps a hash. From now on every request needs a key.", style="dim")


@app.command("list")
def list_keys(home: Home = None, as_json: Json = False) -> None:
    """All keys, the revoked ones too."""
    records = _with_store(settings_with(home=home), lambda store: store.list())
    if as_json:
        typer.echo(msgspec.json.encode([asdict(record) for record in records]))
        return
    if not records:
        typer.echo("No key was made yet: the API is open, and on this machine only.")
        return
    table = Table("id", "key", "name", "tenant", "created", "last used", "revoked", box=None, header_style="dim")
    for record in records:
        times = [_day(moment) for moment in (record.created_ms, record.last_used_ms, record.revoked_ms)]
        style = "dim" if record.revoked_ms is not None else None
        table.add_row(record.id, f"{record.prefix}…", record.name, record.tenant, *times, style=style)
    wide_console().print(table)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="Its id, how it begins, or the whole key.")], home: Home = None
) -> None:
    """End a key's validity. The API stays closed, even where it was the last one."""
    record = _with_store(settings_with(home=home), lambda store: store.revoke(key))
    if record is None:
        raise ClientError("No such key. `spillway keys list` shows them all.")
    typer.echo(f"Revoked {record.id} ({record.name}).")


def _with_store(settings: Settings, act: Callable[[KeyStore], Awaitable[T]]) -> T:
    from scheduler.db.keys import KeyStore
    from scheduler.db.schema import migrate
    from scheduler.db.session import Database

    async def run() -> T:
        database = Database(settings)
        try:
            return await act(KeyStore(database))
        finally:
            await database.close()

    make_home(settings.home)
    migrate(settings)
    return asyncio.run(run())


def _day(moment_ms: int | None) -> str:
    if moment_ms is None:
        return "–"
    return datetime.fromtimestamp(moment_ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M")
