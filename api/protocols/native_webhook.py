"""Bodies of /v1/webhook_endpoints, in the shape of OpenAI's API. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from api.protocols.native_job import decode_strict
from api.protocols.parameters import BadParameter, check_text
from scheduler.event_types import EVENT_TYPES, TEST_EVENT

MAX_NAME_CHARS = 128


class WireEndpoint(msgspec.Struct, kw_only=True):
    url: str
    name: str = ""
    event_types: list[str] = []


class WireEndpointChange(msgspec.Struct, kw_only=True):
    url: str | None = None
    name: str | None = None
    event_types: list[str] | None = None
    enabled: bool | None = None


class WireRotation(msgspec.Struct, kw_only=True):
    keep_old_secret_active_for_24_hours: bool = True


class WireTest(msgspec.Struct, kw_only=True):
    event_type: str = TEST_EVENT


@dataclass(frozen=True, slots=True)
class EndpointChange:
    """What is to be changed; None: it stays."""

    url: str | None
    name: str | None
    event_types: Sequence[str] | None
    enabled: bool | None


def parse_endpoint(body: bytes) -> WireEndpoint:
    """A new endpoint; its URL is for the outbound guard to judge. Raises BadParameter."""
    wire: WireEndpoint = decode_strict(body, WireEndpoint)
    _check(wire.name, wire.event_types)
    return wire


def parse_endpoint_change(body: bytes) -> EndpointChange:
    """Raises BadParameter."""
    wire: WireEndpointChange = decode_strict(body, WireEndpointChange)
    _check(wire.name, wire.event_types)
    return EndpointChange(wire.url, wire.name, wire.event_types, wire.enabled)


def parse_rotation(body: bytes) -> bool:
    """Whether the old secret goes on signing for a day; it does unless told otherwise."""
    wire: WireRotation = decode_strict(body or b"{}", WireRotation)
    return wire.keep_old_secret_active_for_24_hours


def parse_test(body: bytes) -> str:
    """The type of the sample event."""
    wire: WireTest = decode_strict(body or b"{}", WireTest)
    if wire.event_type != TEST_EVENT:
        _check_types([wire.event_type], "event_type")
    return wire.event_type


def _check(name: str | None, event_types: Sequence[str] | None) -> None:
    if name is not None:
        check_text("name", name, MAX_NAME_CHARS)
        if any(ord(character) < 32 or ord(character) == 127 for character in name):
            raise BadParameter("'name' holds a control character.", param="name", reason="invalid_value")
    if event_types is not None:
        _check_types(event_types, "event_types")


def _check_types(event_types: Sequence[str], param: str) -> None:
    for event_type in event_types:
        if event_type not in EVENT_TYPES:
            known = ", ".join(sorted(EVENT_TYPES))
            message = f"'{event_type[:64]}' is no event of this server; these are: {known}."
            raise BadParameter(message, param=param, reason="invalid_value")
