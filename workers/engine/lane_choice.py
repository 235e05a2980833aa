"""Picks the lane for a loaded model and divides the KV budget: half for the working set, half for pages."""

from __future__ import annotations

from scheduler.telemetry import get_logger
from workers.engine import metal
from workers.engine.batch_scheduler import capacity_bucket, row_bucket
from workers.engine.lane import Lane
from workers.engine.loader import LoadedModel
from workers.engine.model_runner import ModelRunner, compiles, probe_slots
from workers.engine.sequential_lane import SequentialLane
from workers.engine.slot_lane import LaneSizes, SlotLane

_log = get_logger(__name__)


def choose_lane(
    loaded: LoadedModel, *, max_rows: int, page_tokens: int, kv_budget_bytes: int | None, compile_steps: bool
) -> Lane:
    """A SlotLane where the model's caches allow it, else a SequentialLane."""
    shapes = probe_slots(loaded.model)
    if shapes is None:
        _log.warning("this model's caches cannot be batched yet; it runs one row at a time", model=loaded.name)
        return SequentialLane(loaded.model, loaded.vocab_size, capacity_bucket(loaded.context_tokens))
    token_bytes = sum(shape.token_bytes for shape in shapes)
    useful_tokens = row_bucket(max_rows) * capacity_bucket(loaded.context_tokens)
    budget = metal.default_kv_budget_bytes() if kv_budget_bytes is None else kv_budget_bytes
    half_tokens = budget // 2 // token_bytes
    sizes = LaneSizes(
        max_rows=max_rows,
        slot_tokens=min(useful_tokens, half_tokens),
        pages=min(useful_tokens, half_tokens) // page_tokens,
        page_tokens=page_tokens,
        vocab_size=loaded.vocab_size,
    )
    if compile_steps and not compiles(loaded.model, shapes):
        _log.warning("this model's step cannot be compiled; it runs uncompiled", model=loaded.name)
        compile_steps = False
    salt = f"{loaded.path}\0{shapes[0].dtype}"
    return SlotLane(ModelRunner(loaded.model, compile_steps=compile_steps), shapes, sizes, salt)
