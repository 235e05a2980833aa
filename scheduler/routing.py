"""Which pool serves a request: the one place that decides it. Pure; called by lifecycle.py when a job is submitted."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.errors import NoModelYet, UnknownModel
from scheduler.model_card import ModelCard

DEFAULT = "default"
LOADING_S = 2.0  # when to ask again for a model whose worker still loads


@dataclass(frozen=True, slots=True)
class Target:
    """Where a job goes: a pool and the card of what it serves."""

    pool: str
    card: ModelCard


def plan(model: str, cards: Sequence[ModelCard]) -> Target:
    """The target for a model name: an exact id, else `default` for the first card.

    Raises UnknownModel, with the nearest names, and NoModelYet where nothing is served now.
    """
    if not cards:
        raise NoModelYet(
            "No worker serves a model yet. One that loads is ready in a moment; without one, start `spillway worker`.",
            retry_after_s=LOADING_S,
        )
    for card in cards:
        if card.id == model:
            return Target(card.id, card)
    if model == DEFAULT and cards:
        return Target(cards[0].id, cards[0])
    raise UnknownModel(_explain(model, [card.id for card in cards]), param="model")


def _explain(model: str, ids: list[str]) -> str:
    shown = model if len(model) <= 100 else model[:100] + "…"
    by_fold = {name.casefold(): name for name in [*ids, DEFAULT]}
    near = [by_fold[fold] for fold in difflib.get_close_matches(model.casefold(), list(by_fold), n=3, cutoff=0.5)]
    if near:
        return f"The model {shown!r} does not exist here; did you mean {' or '.join(map(repr, near))}?"
    served = ", ".join(map(repr, ids[:5])) + (" …" if len(ids) > 5 else "")
    return f"The model {shown!r} does not exist here; served are {served}."
