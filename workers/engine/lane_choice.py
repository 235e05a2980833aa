"""Picks the lane for a loaded model and divides the KV budget: half for the working set, half for what lies beside it.

    plain KV caches, read as mlx_lm reads them     slot lane: batched, pages, prefix reuse
    windows, recurrent states, lists of caches     row lane: batched
    anything else that mlx_lm runs                 sequential lane: rows take turns

Each step down is decided by a probe at load: a model must compute in rows what it computes alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, make_prompt_cache

from scheduler.errors import StartupError
from scheduler.telemetry import get_logger
from workers.engine import metal
from workers.engine.decode_rows import RowSizes
from workers.engine.lane import Lane
from workers.engine.loader import LoadedModel
from workers.engine.model_files import one_line
from workers.engine.model_runner import ModelRunner, attends_by_group, compiles, probe_slots
from workers.engine.page_setup import PageChoices, set_up_pages, set_up_snapshots
from workers.engine.row_lane import RowLane, probe_rows
from workers.engine.row_layers import cache_bytes
from workers.engine.sequential_lane import SequentialLane
from workers.engine.slot_cache import LayerShape
from workers.engine.slot_lane import LaneSizes, SlotLane
from workers.engine.slot_plan import MOST_GROUPS, capacity_bucket, row_bucket

_log = get_logger(__name__)

_MOST_TURNS = 8  # rows that take turns: each waits for all others between two of its tokens
_TRIAL_IDS = (1, 2)


def choose_lane(
    loaded: LoadedModel, *, max_rows: int, pages: PageChoices, kv_budget_bytes: int | None, compile_steps: bool
) -> Lane:
    """The fastest lane in which the model computes what it computes alone; raises StartupError if there is none."""
    caches = _tried_caches(loaded)
    half_bytes = (metal.default_kv_budget_bytes() if kv_budget_bytes is None else kv_budget_bytes) // 2
    shapes = probe_slots(loaded.model)
    if shapes is not None:
        return _slot_lane(loaded, shapes, max_rows, pages, half_bytes, compile_steps)
    layers = probe_rows(loaded.model)
    snapshots = set_up_snapshots(loaded, caches, half_bytes, pages)
    if layers is not None:
        return RowLane(loaded.model, layers, _row_sizes(loaded, caches, max_rows, half_bytes), snapshots)
    kinds = ", ".join(cache_kinds(caches))
    _log.warning("this model's caches cannot be batched; its rows take turns", model=loaded.name, caches=kinds)
    return SequentialLane(loaded.model, _row_sizes(loaded, caches, min(max_rows, _MOST_TURNS), half_bytes), snapshots)


def kv_bytes(loaded: LoadedModel) -> tuple[int, int]:
    """KV memory of a sequence: bytes per token, and bytes that it takes at most however long it is."""
    return cache_bytes(_tried_caches(loaded))


def cache_kinds(caches: Items[Any]) -> list[str]:
    """The kinds of cache that a model keeps, by name, those inside of lists included."""
    names = {type(cache).__name__ for cache in caches}
    for cache in caches:
        if isinstance(cache, CacheList):
            names.update(cache_kinds(cache.caches))
    return sorted(names)


def _tried_caches(loaded: LoadedModel) -> list[Any]:
    """mlx_lm's caches for the model after a first pass with them."""
    kinds = "no cache"
    try:
        caches = make_prompt_cache(loaded.model)
        kinds = ", ".join(cache_kinds(caches)) or kinds
        for token in _TRIAL_IDS:
            logits = loaded.model(mx.array([[token]]), cache=caches)
            mx.eval(logits, [cache.state for cache in caches])
    except Exception as error:  # whatever a model file raises here, it cannot be served
        message = f"Model {loaded.name!r} cannot run here with its caches ({kinds}): {one_line(error)}"
        raise StartupError(message) from error
    return caches


def _slot_lane(
    loaded: LoadedModel,
    shapes: tuple[LayerShape, ...],
    max_rows: int,
    pages: PageChoices,
    half_bytes: int,
    compile_steps: bool,
) -> SlotLane:
    by_group = attends_by_group(loaded.model, shapes)
    if not by_group:
        _log.warning("this model's attention cannot run by group; all rows share one", model=loaded.name)
    useful_tokens = row_bucket(max_rows) * capacity_bucket(loaded.context_tokens)
    half_tokens = half_bytes // sum(shape.token_bytes for shape in shapes)
    sizes = LaneSizes(
        max_rows=max_rows,
        most_groups=MOST_GROUPS if by_group else 1,
        slot_tokens=min(useful_tokens, half_tokens),
        vocab_size=loaded.vocab_size,
    )
    if compile_steps and not compiles(loaded.model, shapes):
        _log.warning("this model's step cannot be compiled; it runs uncompiled", model=loaded.name)
        compile_steps = False
    store = set_up_pages(loaded, shapes, sizes.slot_tokens, pages)
    return SlotLane(ModelRunner(loaded.model, compile_steps=compile_steps), shapes, sizes, store)


def _row_sizes(loaded: LoadedModel, caches: Items[Any], max_rows: int, half_bytes: int) -> RowSizes:
    """As many rows as half of the room holds windows and states of, and the tokens that fit beside them."""
    token_bytes, row_bytes = cache_bytes(caches)
    rows = max_rows if row_bytes == 0 else max(1, min(max_rows, half_bytes // 2 // row_bytes))
    useful_tokens = row_bucket(rows) * capacity_bucket(loaded.context_tokens)
    if token_bytes:
        room_bytes = max(0, half_bytes - row_bucket(rows) * row_bytes)
        useful_tokens = min(useful_tokens, max(capacity_bucket(1), room_bytes // token_bytes))
    return RowSizes(rows, useful_tokens, loaded.vocab_size)
