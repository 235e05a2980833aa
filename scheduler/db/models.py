"""The SQL tables. Migrations follow these classes; `python -m migrations check` shows where they do not.

Finished jobs are content-free: no prompt, no answer, no token. Times are Unix milliseconds. Strings carry a length
because PostgreSQL and a reader of the console both want a bound; writers cut to it (jobs.py).
"""

from __future__ import annotations

from sqlalchemy import BigInteger, MetaData
from sqlmodel import Field, SQLModel

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Table(SQLModel):
    """Root of the tables; constraints are named, so that a later migration can alter them on any database."""

    metadata = MetaData(naming_convention=NAMING)


class FinishedJob(Table, table=True):
    """One job in a terminal state. `attempt` is the one that ended it and fences late writers."""

    __tablename__ = "finished_jobs"  # pyright: ignore[reportAssignmentType]

    id: str = Field(primary_key=True, max_length=96)
    state: str = Field(max_length=16)
    pool: str = Field(max_length=255)
    model: str = Field(max_length=255)
    priority: str = Field(max_length=16)
    tenant: str = Field(max_length=128)
    attempt: int
    created_ms: int = Field(sa_type=BigInteger)
    started_ms: int | None = Field(default=None, sa_type=BigInteger)
    first_token_ms: int | None = Field(default=None, sa_type=BigInteger)
    finished_ms: int = Field(sa_type=BigInteger, index=True)
    deadline_ms: int | None = Field(default=None, sa_type=BigInteger)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error_code: str | None = Field(default=None, max_length=64)
    error_message: str | None = Field(default=None, max_length=500)


class ApiKey(Table, table=True):
    """One API key; of the secret only its SHA-256 (it has 256 random bits) and its first characters are kept."""

    __tablename__ = "api_keys"  # pyright: ignore[reportAssignmentType]

    id: str = Field(primary_key=True, max_length=32)
    name: str = Field(max_length=128)
    tenant: str = Field(max_length=128)
    secret_hash: str = Field(max_length=64, unique=True)
    prefix: str = Field(max_length=24, index=True)
    created_ms: int = Field(sa_type=BigInteger)
    last_used_ms: int | None = Field(default=None, sa_type=BigInteger)
    revoked_ms: int | None = Field(default=None, sa_type=BigInteger)
