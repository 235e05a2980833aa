"""The protocol-neutral inference request: what every wire protocol is translated into and every worker reads.

Built by `api/protocols`, stored as the job's body, read by workers. A body is msgpack and a wire format:
add fields with defaults, never rename or reuse one.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One call that an assistant message made; `arguments` is the JSON text exactly as the model wrote it."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn of the conversation. `content` is the joined text of the turn's text parts."""

    role: Role
    content: str = ""
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen; the one place for sampling defaults (those of OpenAI's API).

    `seed` is always set by the time a job is queued (drawn by the API where the client gave none), so that any
    attempt of the job draws the same tokens. `max_tokens` None means: up to the model's context.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    xtc_probability: float = 0.0  # how often the top choices are excluded; see workers.engine.token_draw
    xtc_threshold: float = 0.1  # the share from which a token is a top choice
    logit_bias: dict[int, float] = {}
    seed: int = 0  # [0, 2**63)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One unit of inference: a conversation and how to continue it `n` times."""

    kind: Literal["chat"] = "chat"
    model: str
    messages: tuple[Message, ...]
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    template_kwargs: dict[str, Any] = {}


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one job over all its attempts; `prompt_tokens` counts the prompt once however large `n` is."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(InferenceRequest)


def encode_request(request: InferenceRequest) -> bytes:
    """The request as a job body (msgpack)."""
    return _encoder.encode(request)


def decode_request(body: bytes) -> InferenceRequest:
    """The inverse of `encode_request`; raises msgspec.ValidationError on a body this version cannot read."""
    return _decoder.decode(body)
