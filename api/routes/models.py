"""GET /v1/models: what is served, in one shape that OpenAI's and Anthropic's SDKs both read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from api.auth import require_principal
from api.protocols.parameters import BadParameter
from api.responses import json_response
from api.services import Services
from scheduler.model_card import ModelCard
from scheduler.routing import plan

MAX_LIMIT = 1000
router = APIRouter(dependencies=[Depends(require_principal)])


@router.get("/v1/models")
async def list_models(
    request: Request, limit: str | None = None, after_id: str | None = None, before_id: str | None = None
) -> Response:
    """All served models, the default first; `limit`, `after_id` and `before_id` as Anthropic's API has them."""
    cards = await _cards(request)
    ids = [card.id for card in cards]
    start = ids.index(after_id) + 1 if after_id in ids else 0
    end = ids.index(before_id) if before_id in ids else len(ids)
    page = cards[start:end][: read_limit(limit, MAX_LIMIT, MAX_LIMIT)]
    return json_response(
        {
            "object": "list",
            "data": [model_body(card) for card in page],
            "has_more": bool(page) and page[-1].id != ids[end - 1],
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
        }
    )


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> Response:
    """One model by its id (ids may hold slashes) or by the alias `default`."""
    return json_response(model_body(plan(model, await _cards(request)).card))


def model_body(card: ModelCard) -> dict[str, Any]:
    """OpenAI's Model, Anthropic's ModelInfo, and the hints of vLLM and OpenRouter in one object."""
    return {
        "id": card.id,
        "object": "model",
        "created": card.created_s,
        "owned_by": "spillway",
        "type": "model",
        "display_name": card.id,
        "created_at": datetime.fromtimestamp(card.created_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": card.context_tokens,
        "max_tokens": card.context_tokens,
        "capabilities": None,
        "max_model_len": card.context_tokens,
        "context_length": card.context_tokens,
    }


def read_limit(text: str | None, default: int, highest: int) -> int:
    """A page's length from its query parameter; raises BadParameter outside 1 to `highest`."""
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= highest):
        raise BadParameter(f"'limit' is a whole number, 1 to {highest}.", param="limit", reason="invalid_value")
    return int(text)


async def _cards(request: Request) -> list[ModelCard]:
    services: Services = request.app.state.services
    return await services.fleet.models()
