"""Sets up a model's page store from what the owner chose: its salt, and the disk tier where the model can have one."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduler.settings import Settings
from workers.engine.cache_state import can_be_kept, parts_of, plain_parts, plain_shapes
from workers.engine.disk_pages import DiskPages
from workers.engine.kv_pages import KvPages, page_layout
from workers.engine.loader import LoadedModel
from workers.engine.page_folder import DiskLimits
from workers.engine.page_salt import model_salt
from workers.engine.slot_cache import LayerShape
from workers.engine.snapshots import Snapshots

_MOST_PAGES = 1 << 16  # of models that keep nothing per token: their pages are names only


@dataclass(frozen=True, slots=True)
class DiskTier:
    """Where KV pages are kept on disk, and how much of it; see page_folder."""

    tree: Path
    limits: DiskLimits

    @staticmethod
    def from_settings(settings: Settings) -> DiskTier | None:
        if settings.kv_disk_bytes == 0:
            return None
        return DiskTier(settings.home / "kv", DiskLimits(settings.kv_disk_bytes, settings.disk_reserve_bytes))


@dataclass(frozen=True, slots=True)
class PageChoices:
    """Tokens of a page, and the disk tier if there is to be one."""

    page_tokens: int
    disk: DiskTier | None = None


def set_up_pages(loaded: LoadedModel, shapes: Items[LayerShape], tokens: int, choices: PageChoices) -> KvPages:
    """Pages for `tokens` tokens; on disk too only for models that can be told apart after a restart."""
    size, pages, disk = choices.page_tokens, tokens // choices.page_tokens, choices.disk
    salt = model_salt(loaded.path, str(loaded.dtype))
    layout = page_layout(shapes, size)
    if salt is None or layout is None or disk is None:
        return KvPages(shapes, pages, size, salt or str(loaded.path))
    return KvPages(shapes, pages, size, salt, DiskPages(disk.tree, salt, layout, disk.limits))


def set_up_snapshots(
    loaded: LoadedModel, caches: Items[Any], budget_bytes: int, choices: PageChoices
) -> Snapshots | None:
    """Snapshots and pages for a model with these caches, which have read something; None where a kind is unknown.

    Half of the budget is for snapshots, half for the pages of the plain layers, in memory only.
    """
    if not can_be_kept(caches):
        return None
    shapes = plain_shapes(caches)
    page_bytes = choices.page_tokens * sum(shape.token_bytes for shape in shapes)
    pages = min(_MOST_PAGES, budget_bytes // 2 // max(1, page_bytes))
    store = KvPages(shapes, pages, choices.page_tokens, str(loaded.path))
    stateful = len(plain_parts(caches)) < len(parts_of(caches))
    return Snapshots(loaded.model, store, budget_bytes // 2, stateful=stateful)
