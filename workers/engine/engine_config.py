"""What an owner can set of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.settings import Settings
from workers.engine.page_setup import DiskTier


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an owner can set; see Settings."""

    max_rows: int = 32
    page_tokens: int = 32
    kv_budget_bytes: int | None = None
    prefill_stall_ms: int = 120
    batch_stall_ms: int = 500
    compile: bool = True
    wired_limit_bytes: int | None = None  # memory to pin on Metal; never forced, see metal.py
    metal_cache_bytes: int | None = None
    disk: DiskTier | None = None

    @staticmethod
    def from_settings(settings: Settings) -> EngineConfig:
        return EngineConfig(
            max_rows=settings.max_rows,
            page_tokens=settings.page_tokens,
            kv_budget_bytes=settings.kv_budget_bytes,
            prefill_stall_ms=settings.prefill_stall_ms,
            batch_stall_ms=settings.batch_stall_ms,
            compile=settings.compile,
            disk=DiskTier.from_settings(settings),
            wired_limit_bytes=settings.wired_limit_bytes,
            metal_cache_bytes=settings.metal_cache_bytes,
        )
