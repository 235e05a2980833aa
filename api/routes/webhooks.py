"""/v1/webhook_endpoints: where a tenant is told of the ends of its jobs and batches, in the shape of OpenAI's API.

Beside OpenAI's: deliveries with their tries, and another try for a dead one.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from api.body import read_body
from api.job_lookup import Caller
from api.protocols.native_webhook import parse_endpoint, parse_endpoint_change, parse_rotation, parse_test
from api.protocols.parameters import BadParameter
from api.responses import json_response
from api.routes.models import read_limit
from api.services import Services
from scheduler.db.webhook_deliveries import DeliveryView
from scheduler.db.webhook_endpoints import EndpointView
from scheduler.errors import WebhookConflict, WebhookNotFound
from scheduler.outbound import check_url
from scheduler.outbound_policy import OutboundPolicy
from scheduler.webhooks import DELIVER

MAX_BODY_BYTES = 64 * 1024
MAX_LIMIT = 1000
TEST_WAIT_S = 17.0  # a little longer than one try may take
TEST_LOOK_S = 0.1
STATUSES = ("pending", "delivered", "dead")
router = APIRouter()


@router.post("/v1/webhook_endpoints")
async def create_endpoint(request: Request, caller: Caller) -> Response:
    """Register an endpoint. Its secret is in this answer and in no other."""
    services: Services = request.app.state.services
    wire = parse_endpoint(await read_body(request, MAX_BODY_BYTES))
    await _check_url(services, wire.url)
    endpoint, secret = await services.webhooks.create(caller.tenant, wire.url, wire.name, wire.event_types)
    return json_response(endpoint_body(endpoint) | {"signing_secret": secret})


@router.get("/v1/webhook_endpoints")
async def list_endpoints(request: Request, caller: Caller) -> Response:
    """All endpoints that the caller may see, the newest first; there are few."""
    services: Services = request.app.state.services
    found = await services.webhooks.list(None if caller.key_id is None else caller.tenant)
    return json_response(_page([endpoint_body(endpoint) for endpoint in found], has_more=False))


@router.get("/v1/webhook_endpoints/{endpoint_id}")
async def get_endpoint(request: Request, caller: Caller, endpoint_id: str) -> Response:
    """One endpoint, without its secret."""
    return json_response(endpoint_body(await _find(request, caller, endpoint_id)))


@router.post("/v1/webhook_endpoints/{endpoint_id}")
async def update_endpoint(request: Request, caller: Caller, endpoint_id: str) -> Response:
    """Change its URL, name or event types; `enabled` false stops new events, true sends what waits."""
    services: Services = request.app.state.services
    endpoint = await _find(request, caller, endpoint_id)
    change = parse_endpoint_change(await read_body(request, MAX_BODY_BYTES))
    if change.url is not None:
        await _check_url(services, change.url)
    changed = await services.webhooks.update(
        endpoint.id, url=change.url, name=change.name, events=change.event_types, enabled=change.enabled
    )
    if changed is None:
        raise _no_endpoint(endpoint_id)
    return json_response(endpoint_body(changed))


@router.delete("/v1/webhook_endpoints/{endpoint_id}")
async def delete_endpoint(request: Request, caller: Caller, endpoint_id: str) -> Response:
    """Remove an endpoint and what was on its way to it."""
    services: Services = request.app.state.services
    endpoint = await _find(request, caller, endpoint_id)
    deleted = await services.webhooks.delete(endpoint.id)
    return json_response({"id": endpoint.id, "object": "webhook_endpoint.deleted", "deleted": deleted})


@router.post("/v1/webhook_endpoints/{endpoint_id}/rotate_secret")
async def rotate_secret(request: Request, caller: Caller, endpoint_id: str) -> Response:
    """A new secret. The old one signs along for a day, unless the body says that it must not."""
    services: Services = request.app.state.services
    endpoint = await _find(request, caller, endpoint_id)
    keep_old = parse_rotation(await read_body(request, MAX_BODY_BYTES))
    rotated = await services.webhooks.rotate(endpoint.id, keep_old=keep_old)
    if rotated is None:
        raise _no_endpoint(endpoint_id)
    return json_response(endpoint_body(rotated[0]) | {"signing_secret": rotated[1]})


@router.post("/v1/webhook_endpoints/{endpoint_id}/test")
async def test_endpoint(request: Request, caller: Caller, endpoint_id: str) -> Response:
    """Send a sample event now and tell what the receiver answered; `status_code` null: nothing, see `delivery`."""
    services: Services = request.app.state.services
    endpoint = await _find(request, caller, endpoint_id)
    event_type = parse_test(await read_body(request, MAX_BODY_BYTES))
    delivery_id = await services.webhooks.add_test(endpoint, event_type)
    await services.kick(DELIVER, delivery_id)
    delivery = await _tried(services, delivery_id)
    answer = {
        "object": "webhook_endpoint.test",
        "webhook_endpoint_id": endpoint.id,
        "event_type": event_type,
        "status_code": delivery.last_status,
        "success": delivery.status == "delivered",
        "delivery": delivery_body(delivery),
    }
    return json_response(answer)


@router.get("/v1/webhook_endpoints/{endpoint_id}/deliveries")
async def list_deliveries(
    request: Request,
    caller: Caller,
    endpoint_id: str,
    status: str | None = None,
    after: str | None = None,
    limit: str | None = None,
) -> Response:
    """A page of what was or is to be sent there, the newest first."""
    services: Services = request.app.state.services
    endpoint = await _find(request, caller, endpoint_id)
    if status is not None and status not in STATUSES:
        raise BadParameter(f"'status' is one of: {', '.join(STATUSES)}.", param="status", reason="invalid_value")
    count = read_limit(limit, 20, MAX_LIMIT)
    found = await services.deliveries.list(endpoint.id, status=status, after=after, limit=count + 1)
    return json_response(_page([delivery_body(view) for view in found[:count]], has_more=len(found) > count))


@router.post("/v1/webhook_deliveries/{delivery_id}/retry")
async def retry_delivery(request: Request, caller: Caller, delivery_id: str) -> Response:
    """Try a dead delivery anew, at once."""
    services: Services = request.app.state.services
    delivery = await services.deliveries.get(delivery_id)
    if delivery is None or not caller.may_see(delivery.tenant):
        raise WebhookNotFound(f"No webhook delivery {delivery_id[:80]!r}.", param="delivery_id")
    if not await services.deliveries.revive(delivery.id):
        raise WebhookConflict(f"{delivery.id} is {delivery.status}; only a dead delivery can be tried again.")
    await services.kick(DELIVER, delivery.id)
    return json_response(delivery_body(await services.deliveries.get(delivery.id) or delivery))


def endpoint_body(endpoint: EndpointView) -> dict[str, Any]:
    """OpenAI's WebhookEndpoint, and whether it is enabled."""
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": list(endpoint.events),
        "created_at": endpoint.created_ms // 1000,
        "enabled": endpoint.disabled_ms is None,
        "disabled_at": None if endpoint.disabled_ms is None else endpoint.disabled_ms // 1000,
        "disabled_reason": endpoint.disabled_reason,
    }


def delivery_body(view: DeliveryView) -> dict[str, Any]:
    """A delivery with the body that it carries; times are Unix ms."""
    return {
        "id": view.id,
        "object": "webhook_delivery",
        "webhook_endpoint_id": view.endpoint_id,
        "event_id": view.event_id,
        "type": view.type,
        "status": view.status,
        "attempts": view.attempts,
        "created_ms": view.created_ms,
        "next_ms": view.next_ms,
        "finished_ms": view.finished_ms,
        "last_status": view.last_status,
        "last_error": view.last_error,
        "event": json.loads(view.payload),
    }


async def _tried(services: Services, delivery_id: str) -> DeliveryView:
    """The delivery after its first try, or as it is when that takes too long."""
    give_up_s = time.monotonic() + TEST_WAIT_S
    while True:
        found = await services.deliveries.get(delivery_id)
        if found is None:
            raise WebhookNotFound("The endpoint was deleted meanwhile.")
        tried = found.status != "pending" or found.last_error is not None
        if tried or time.monotonic() > give_up_s:
            return found
        await asyncio.sleep(TEST_LOOK_S)


async def _find(request: Request, caller: Caller, endpoint_id: str) -> EndpointView:
    services: Services = request.app.state.services
    endpoint = await services.webhooks.get(endpoint_id)
    if endpoint is None or not caller.may_see(endpoint.tenant):
        raise _no_endpoint(endpoint_id)
    return endpoint


async def _check_url(services: Services, url: str) -> None:
    refusal = await check_url(url, OutboundPolicy(services.settings))
    if refusal is not None:
        raise BadParameter(f"This URL cannot be called: {refusal}.", param="url", reason="invalid_value")


def _no_endpoint(endpoint_id: str) -> WebhookNotFound:
    return WebhookNotFound(f"No webhook endpoint {endpoint_id[:80]!r}.", param="webhook_endpoint_id")


def _page(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "has_more": has_more, "first_id": first, "last_id": last}
