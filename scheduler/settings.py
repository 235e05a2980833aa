"""The only place that reads the environment. Every value is `SPILLWAY_<NAME>`; a bad one stops the start by name."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from scheduler.errors import StartupError


class Settings(BaseSettings):
    """Effective configuration of one process."""

    model_config = SettingsConfigDict(env_prefix="SPILLWAY_", extra="ignore", frozen=True)

    home: Path = Path("~/.spillway")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    redis_url: str | None = None
    redis_wait_s: float = Field(default=30.0, ge=0)  # a Procfile starts everything at once
    database_url: str | None = None
    shard: str = Field(default="0", pattern=r"^[a-z0-9]{1,16}$")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "human", "json"] = "auto"

    # API
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    max_file_bytes: int = Field(default=512 * 10**6, ge=1024)
    max_batch_file_bytes: int = Field(default=200 * 10**6, ge=1024)
    max_batch_lines: int = Field(default=50_000, ge=1, le=1_000_000)
    disk_reserve_bytes: int = Field(default=64 * 2**20, ge=0)  # what stored files leave to queue, database and logs
    keepalive_s: float = Field(default=15.0, gt=0)
    allowed_hosts: str = ""
    allowed_origins: str = ""

    # Requests that this server makes: origins that may be plain http or have a private address, http://127.0.0.1:9000
    outbound_origins: str = ""
    secret_key: str | None = Field(default=None, repr=False)

    # Queue
    queue_depth_cap: int = Field(default=10_000, ge=1)
    lease_ttl_ms: int = Field(default=1500, ge=200)
    sweep_interval_ms: int = Field(default=250, ge=20)
    max_attempts: int = Field(default=5, ge=1)
    max_lost: int = Field(default=3, ge=1)
    job_retention_s: int = Field(default=600, ge=10)
    urgent_slack_ms: int = Field(default=2000, ge=0)
    batch_kv_threshold: float = Field(default=0.7, gt=0, le=1)
    queue_ttl_s: int = Field(default=24 * 3600, ge=10)
    held_jobs_cap: int = Field(default=100_000, ge=1)  # accepted jobs of one tenant that wait in SQL
    open_batches_cap: int = Field(default=100, ge=1)  # batches of one tenant that are not at their end
    batch_window: int = Field(default=512, ge=1)  # lines of one batch that are in the queue together

    # Worker and engine
    models: str = "demo"
    workers: int = Field(default=1, ge=1, le=64)
    max_rows: int = Field(default=32, ge=1, le=512)
    page_tokens: int = Field(default=32, ge=8, le=256)
    kv_budget_bytes: int | None = Field(default=None, ge=1 << 20)
    kv_disk_bytes: int = Field(default=4 << 30, ge=0)  # KV pages kept below `home`, all models together; 0: none
    prefix_sharing: Literal["tenant", "all"] = "tenant"  # who finds whose prompts' KV; a hit is faster, so it shows
    prefill_stall_ms: int = Field(default=120, ge=1)
    batch_stall_ms: int = Field(default=500, ge=1)  # instead, while all running rows are batch work
    wired_limit_bytes: int | None = Field(default=None, ge=1 << 20)  # Metal: pin so much; forcing it panicked kernels
    metal_cache_bytes: int | None = Field(default=None, ge=0)  # Metal: freed buffers that are kept
    engine_threads: int | None = Field(default=None, ge=1)
    engine_hang_s: float = Field(default=60.0, gt=0)
    system_blas: bool = True
    compile: bool = True
    allow_download: bool = True
    drain_s: float = Field(default=10.0, ge=0)

    # Set by `spillway up` for its children: the reading end of a pipe that closes when `up` is gone
    parent_pipe: int | None = Field(default=None, ge=0)

    # Commands that talk to a running service
    url: str | None = None
    api_key: str | None = Field(default=None, repr=False)

    # SQL
    finished_job_retention_days: int = Field(default=30, ge=1)
    durable_job_retention_days: int = Field(default=30, ge=1)

    @field_validator("home")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("outbound_origins")
    @classmethod
    def _check_origins(cls, value: str) -> str:
        for entry in filter(None, (part.strip() for part in value.split(","))):
            if _ORIGIN.fullmatch(entry) is None:
                raise ValueError(f"{entry!r} is not an origin like http://127.0.0.1:9000 (no path, several by commas)")
        return value

    @property
    def model_refs(self) -> tuple[str, ...]:
        """The model references to serve, first one is the default."""
        return tuple(ref.strip() for ref in self.models.split(",") if ref.strip())

    def as_environment(self) -> dict[str, str]:
        """The variables that give a child process these settings."""
        chosen = {name: getattr(self, name) for name in self.model_fields_set}
        return {f"SPILLWAY_{name.upper()}": str(value) for name, value in chosen.items() if value is not None}

    @property
    def sql_url(self) -> str:
        """SQLAlchemy URL with its async driver."""
        url = self.database_url
        if url is None:
            return f"sqlite+aiosqlite:///{self.home / 'spillway.db'}"
        for plain, driver in _ASYNC_DRIVERS.items():
            if url.startswith(plain):
                return driver + url.removeprefix(plain)
        return url


_ORIGIN = re.compile(r"https?://(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_ASYNC_DRIVERS = {
    "postgres://": "postgresql+asyncpg://",
    "postgresql://": "postgresql+asyncpg://",
    "sqlite://": "sqlite+aiosqlite://",
}


@functools.cache
def load_settings(**overrides: str | int | Path) -> Settings:
    """The process's settings, options of its command line first; raises StartupError naming each bad variable."""
    try:
        return Settings(**cast("dict[str, Any]", overrides))
    except ValidationError as error:
        lines = [f"SPILLWAY_{str(item['loc'][0]).upper()}: {item['msg']}" for item in error.errors()]
        raise StartupError("Bad configuration: " + "; ".join(lines)) from error
