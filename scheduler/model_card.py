"""What a pool serves: published by workers in the fleet registry, shown by /v1/models, read by routing."""

from __future__ import annotations

import msgspec


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One model behind one pool; `position` 0 of an `up` is `default`, `created_s` is Unix time."""

    id: str
    context_tokens: int
    kind: str = "text"
    created_s: int = 0
    position: int = 0
    vocab_size: int = 0
    max_rows: int = 1
    kv_budget_tokens: int = 0
    details: dict[str, str | int | float | bool] = {}
