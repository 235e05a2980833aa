"""Run by Alembic: hands it the tables and the open connection that scheduler/db/schema.py prepared."""

from typing import Literal

from alembic import context
from sqlmodel import AutoString

from migrations import VERSION_TABLE
from scheduler.db.models import Table


def render_item(kind: str, item: object, _autogenerate: object) -> str | Literal[False]:
    """A migration names SQLAlchemy's types only: what SQLModel's are may change after it was written."""
    if kind == "type" and isinstance(item, AutoString):
        return f"sa.String(length={item.length})"
    return False


connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("Alembic was run by hand. Use `python -m migrations` (upgrade, check or revision).")

context.configure(
    connection=connection,
    target_metadata=Table.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,
    render_item=render_item,
)
with context.begin_transaction():
    context.run_migrations()
