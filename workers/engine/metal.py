"""Memory rules of the device: limits, when to give memory back, and how much KV may use. Engine thread only.

On Metal: a cache limit always, wired memory only when asked for (forcing it has panicked kernels), and clear_cache
rarely, after a synchronise. On Linux CPU only the KV budget applies.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import psutil

from scheduler.errors import StartupError
from scheduler.telemetry import get_logger

_log = get_logger(__name__)

_CACHE_SHARE = 0.1  # of the device's recommended working set: freed buffers that MLX may keep
_KV_SHARE_METAL = 0.5  # of what the weights leave
_KV_SHARE_HOST = 0.25  # of available memory, on machines that run other things too
_CLEAR_EVERY_STEPS = 512


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What a process may keep: freed buffers, and pinned memory if any."""

    cache_bytes: int
    wired_bytes: int | None


def device_limits(recommended_bytes: int, *, wired_bytes: int | None, cache_bytes: int | None) -> DeviceLimits:
    """The owner's limits or the defaults, for a device with this recommended working set; raises StartupError."""
    if wired_bytes is not None and wired_bytes > recommended_bytes:
        raise StartupError(
            f"SPILLWAY_WIRED_LIMIT_BYTES: {wired_bytes} is more than the {recommended_bytes} bytes that this machine's "
            "GPU may use; choose less, or raise iogpu.wired_limit_mb first."
        )
    return DeviceLimits(int(recommended_bytes * _CACHE_SHARE) if cache_bytes is None else cache_bytes, wired_bytes)


def configure_device(*, wired_bytes: int | None = None, cache_bytes: int | None = None) -> None:
    """Set the limits of this process; once, before traffic. Raises StartupError for a limit that cannot be set."""
    if not mx.metal.is_available():
        if wired_bytes is not None or cache_bytes is not None:
            _log.warning("SPILLWAY_WIRED_LIMIT_BYTES and SPILLWAY_METAL_CACHE_BYTES are for Metal; without effect here")
        return
    recommended = int(mx.device_info()["max_recommended_working_set_size"])
    limits = device_limits(recommended, wired_bytes=wired_bytes, cache_bytes=cache_bytes)
    mx.set_cache_limit(limits.cache_bytes)
    if limits.wired_bytes is not None:
        mx.set_wired_limit(limits.wired_bytes)


def default_kv_budget_bytes() -> int:
    """KV memory when the owner names none; call after loading."""
    if mx.metal.is_available():
        recommended = int(mx.device_info()["max_recommended_working_set_size"])
        return int(max(recommended - mx.get_active_memory(), recommended * 0.1) * _KV_SHARE_METAL)
    return int(psutil.virtual_memory().available * _KV_SHARE_HOST)


def tidy(step: int) -> None:
    """Give freed buffers back now and then; call between steps with the step number."""
    if step % _CLEAR_EVERY_STEPS == 0:
        release_memory()


def release_memory() -> None:
    """Give freed buffers back now, e.g. after large arrays were dropped."""
    mx.synchronize()
    mx.clear_cache()
