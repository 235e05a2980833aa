"""Memory rules of the device: limits, when to give memory back, and how much KV may use. Engine thread only.

On Metal: a cache limit always, wired memory only when asked for (forcing it has panicked kernels), and clear_cache
rarely, after a synchronise. On Linux CPU only the KV budget applies.
"""

from __future__ import annotations

import mlx.core as mx
import psutil

_CACHE_SHARE = 0.1  # of the device's recommended working set: freed buffers that MLX may keep
_KV_SHARE_METAL = 0.5  # of what the weights leave
_KV_SHARE_HOST = 0.25  # of available memory, on machines that run other things too
_CLEAR_EVERY_STEPS = 512


def configure_device(*, wired: bool = False) -> None:
    """Set the limits of this process; once, before traffic."""
    if not mx.metal.is_available():
        return
    recommended = int(mx.device_info()["max_recommended_working_set_size"])
    mx.set_cache_limit(int(recommended * _CACHE_SHARE))
    if wired:
        mx.set_wired_limit(recommended)


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
