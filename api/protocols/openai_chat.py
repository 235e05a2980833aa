"""POST /v1/chat/completions → InferenceRequest. Pure; called by routes/chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from api.protocols.openai_chat_messages import WireMessage, read_messages
from api.protocols.openai_chat_options import check_refused, unknown_fields
from api.protocols.parameters import (
    INT32_MAX,
    INT64_MAX,
    BadParameter,
    check_length,
    check_range,
    check_storable,
    check_text,
    decode_fields,
    decode_struct,
)
from scheduler.errors import UnsupportedOption
from scheduler.job import Priority
from scheduler.request import InferenceRequest, SamplingParams

MAX_STOPS = 4
MAX_STOP_CHARS = 1000
MAX_MODEL_CHARS = 256
TINY = 1e-6

_TIERS: dict[str, Priority] = {
    "priority": Priority.HIGH,
    "fast": Priority.HIGH,
    "ultrafast": Priority.HIGH,
    "auto": Priority.NORMAL,
    "default": Priority.NORMAL,
    "scale": Priority.NORMAL,
    "flex": Priority.LOW,
}
TIER_OF_PRIORITY: dict[Priority, str] = {
    Priority.HIGH: "priority",
    Priority.NORMAL: "default",
    Priority.LOW: "flex",
    Priority.BATCH: "flex",
}

_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_k": (-1, INT32_MAX),
    "repetition_penalty": (TINY, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),  # above, no token could be passed over for a lesser one
    "seed": (-INT64_MAX - 1, INT64_MAX),
    "max_tokens": (1, INT32_MAX),
    "max_completion_tokens": (1, INT32_MAX),
    "min_tokens": (0, INT32_MAX),
    "n": (1, 128),
    "top_logprobs": (0, 20),
    "priority": (-INT32_MAX, INT32_MAX),
}


class WireStreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class WireChat(msgspec.Struct, kw_only=True):
    """The members of the body that have an effect."""

    model: str
    messages: list[WireMessage]
    stream: bool | None = None
    stream_options: WireStreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    service_tier: str | None = None
    priority: int | None = None


_KNOWN = frozenset(WireChat.__struct_fields__)


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One parsed call. `priority` is what the body asks for; `ignored` names members that nothing reads."""

    request: InferenceRequest
    stream: bool
    include_usage: bool
    priority: Priority
    ignored: tuple[str, ...]


def parse_chat(body: bytes, fallback_seed: int) -> ChatCall:
    """The call in `body`; `fallback_seed` serves where the client gave none. Raises ClientError subclasses."""
    fields = decode_fields(body)
    check_refused(fields)
    wire = decode_struct(body, WireChat)
    for name, (low, high) in _RANGES.items():
        check_range(name, getattr(wire, name), low, high)
    if wire.model == "":
        raise BadParameter("'model' must not be empty.", param="model", reason="invalid_value")
    check_text("model", wire.model, MAX_MODEL_CHARS)
    template_kwargs = {} if wire.chat_template_kwargs is None else wire.chat_template_kwargs
    check_storable("chat_template_kwargs", template_kwargs)
    request = InferenceRequest(
        model=wire.model,
        messages=read_messages(wire.messages),
        sampling=_read_sampling(wire, fallback_seed),
        n=1 if wire.n is None else wire.n,
        template_kwargs=template_kwargs,
    )
    return ChatCall(
        request=request,
        stream=bool(wire.stream),
        include_usage=_read_stream_options(wire),
        priority=_read_priority(wire),
        ignored=unknown_fields(fields, _KNOWN),
    )


def _read_sampling(wire: WireChat, fallback_seed: int) -> SamplingParams:
    given: dict[str, Any] = {
        "temperature": wire.temperature,
        "top_p": wire.top_p,
        "top_k": None if wire.top_k is None else max(wire.top_k, 0),
        "min_p": wire.min_p,
        "repetition_penalty": wire.repetition_penalty,
        "presence_penalty": wire.presence_penalty,
        "frequency_penalty": wire.frequency_penalty,
        "xtc_probability": wire.xtc_probability,
        "xtc_threshold": wire.xtc_threshold,
        "logit_bias": _read_bias(wire.logit_bias),
        "seed": fallback_seed if wire.seed is None else wire.seed & INT64_MAX,
        "max_tokens": _read_max_tokens(wire),
        "min_tokens": wire.min_tokens,
        "stop": _read_stop(wire.stop),
        "stop_token_ids": _read_stop_ids(wire.stop_token_ids),
        "include_stop": wire.include_stop_str_in_output,
        "ignore_eos": wire.ignore_eos,
        "logprobs": wire.logprobs,
        "top_logprobs": _read_top_logprobs(wire),
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _read_max_tokens(wire: WireChat) -> int | None:
    longest = wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens
    if longest is not None and wire.min_tokens is not None and wire.min_tokens > longest:
        raise BadParameter(
            f"'min_tokens' ({wire.min_tokens}) is above the largest number of tokens asked for ({longest}).",
            param="min_tokens",
            reason="invalid_value",
        )
    return longest


def _read_stop(stop: str | list[str] | None) -> tuple[str, ...] | None:
    if stop is None:
        return None
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise BadParameter(
            f"Invalid 'stop': array too long. Expected at most {MAX_STOPS} strings, but got {len(stops)} instead.",
            param="stop",
            reason="array_above_max_length",
        )
    for text in stops:
        check_length("stop", text, MAX_STOP_CHARS)
    if "" in stops:
        raise BadParameter("Invalid 'stop': a stop string must not be empty.", param="stop", reason="invalid_value")
    return stops


def _read_stop_ids(ids: list[int] | None) -> tuple[int, ...] | None:
    if ids is None:
        return None
    for position, token_id in enumerate(ids):
        check_range(f"stop_token_ids[{position}]", token_id, 0, INT32_MAX)
    return tuple(ids)


def _read_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    read: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise BadParameter(
                f"Invalid key in 'logit_bias': '{key[:64]}'. Keys are token ids.",
                param="logit_bias",
                reason="invalid_value",
            )
        check_range(f"logit_bias.{key}", value, -100, 100)
        read[int(key)] = value
    return read


def _read_top_logprobs(wire: WireChat) -> int | None:
    if wire.top_logprobs and not wire.logprobs:
        raise BadParameter(
            "'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs", reason="invalid_value"
        )
    return wire.top_logprobs


def _read_stream_options(wire: WireChat) -> bool:
    options = wire.stream_options
    if options is None:
        return False
    if not wire.stream:
        raise BadParameter(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options", reason="invalid_value"
        )
    if options.continuous_usage_stats:
        raise UnsupportedOption(
            "Usage on every chunk is not supported; leave it out, or ask for 'include_usage'.",
            param="stream_options.continuous_usage_stats",
        )
    return bool(options.include_usage)


def _read_priority(wire: WireChat) -> Priority:
    """vLLM's `priority` (lower runs earlier, 0 is normal) is the more precise wish, so it goes before the tier."""
    if wire.priority is not None:
        return Priority.NORMAL if wire.priority == 0 else Priority.HIGH if wire.priority < 0 else Priority.LOW
    if wire.service_tier is None:
        return Priority.NORMAL
    if wire.service_tier not in _TIERS:
        known = ", ".join(f"'{tier}'" for tier in _TIERS)
        raise BadParameter(
            f"Invalid value: '{wire.service_tier[:64]}'. Supported values are: {known}.",
            param="service_tier",
            reason="invalid_value",
        )
    return _TIERS[wire.service_tier]
