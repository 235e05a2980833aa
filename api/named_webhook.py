"""The webhook endpoint that a submission names by id or URL; called by the routes that accept jobs and batches."""

from __future__ import annotations

from api.auth import Principal
from api.protocols.parameters import BadParameter
from api.services import Services
from scheduler.db.webhook_choice import WebhookChoice, choose_endpoint


async def named_webhook(services: Services, caller: Principal, wanted: str | None) -> str | None:
    """Its id; None where none is named. Raises BadParameter where the caller has no such endpoint that is enabled."""
    if wanted is None:
        return None
    match await choose_endpoint(services.database, caller.tenant, wanted):
        case WebhookChoice(endpoint_id, disabled=False):
            return endpoint_id
        case WebhookChoice(endpoint_id):
            message = f"The webhook endpoint {endpoint_id} is disabled; enable it first."
        case None:
            message = "No webhook endpoint has this id or URL; register it first at /v1/webhook_endpoints."
    raise BadParameter(message, param="webhook", reason="invalid_value")
