"""Chat completion bodies: what is read, what is refused, and how precisely the refusal says why."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.errors import problem_of
from api.protocols.openai_chat import ChatCall, parse_chat
from api.protocols.openai_chat_options import HINTS, REFUSED
from scheduler.errors import ClientError, SpillwayError
from scheduler.job import Priority
from scheduler.request import Message, SamplingParams, ToolCall, decode_request, encode_request

USER = {"role": "user", "content": "hi"}


def parse(**fields: Any) -> ChatCall:
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode(), fallback_seed=7)


def parse_messages(*messages: Any) -> tuple[Message, ...]:
    return parse(messages=list(messages)).request.messages


def refusal(body: bytes | dict[str, Any]) -> tuple[int, str | None, str | None]:
    """Status, param and code of the error that this body is answered with."""
    raw = body if isinstance(body, bytes) else json.dumps({"model": "m", "messages": [USER], **body}).encode()
    with pytest.raises(ClientError) as caught:
        parse_chat(raw, fallback_seed=7)
    problem = problem_of(caught.value)
    assert problem.type == "invalid_request_error"
    return problem.status, problem.param, problem.code


def test_the_smallest_body_gets_the_defaults() -> None:
    call = parse()
    assert call.request.sampling == SamplingParams(seed=7)
    assert (call.stream, call.include_usage, call.priority, call.ignored) == (False, False, Priority.NORMAL, ())
    assert call.request.messages == (Message(role="user", content="hi"),)


def test_explicit_nulls_are_defaults() -> None:
    names = [name for name in SAMPLING if name != "messages"]
    assert parse(**dict.fromkeys([*names, *REFUSED, *HINTS])).request == parse().request


SAMPLING: dict[str, tuple[Any, str, Any]] = {
    "temperature": (0, "temperature", 0.0),
    "top_p": (0.5, "top_p", 0.5),
    "top_k": (40, "top_k", 40),
    "min_p": (0.1, "min_p", 0.1),
    "repetition_penalty": (1.1, "repetition_penalty", 1.1),
    "presence_penalty": (-1, "presence_penalty", -1.0),
    "frequency_penalty": (2, "frequency_penalty", 2.0),
    "xtc_probability": (0.5, "xtc_probability", 0.5),
    "xtc_threshold": (0.2, "xtc_threshold", 0.2),
    "logit_bias": ({"5": -100, "6": 1.5}, "logit_bias", {5: -100.0, 6: 1.5}),
    "seed": (2**62, "seed", 2**62),
    "max_tokens": (10, "max_tokens", 10),
    "max_completion_tokens": (11, "max_tokens", 11),
    "min_tokens": (3, "min_tokens", 3),
    "stop": ("END", "stop", ("END",)),
    "stop_token_ids": ([1, 2], "stop_token_ids", (1, 2)),
    "include_stop_str_in_output": (True, "include_stop", True),
    "ignore_eos": (True, "ignore_eos", True),
    "logprobs": (True, "logprobs", True),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_every_sampling_parameter_reaches_the_worker(name: str) -> None:
    sent, field, kept = SAMPLING[name]
    request = decode_request(encode_request(parse(**{name: sent}).request))
    assert getattr(request.sampling, field) == kept


def test_every_field_of_sampling_params_can_be_set() -> None:
    reachable = {field for _, field, _ in SAMPLING.values()} | {"top_logprobs"}
    assert reachable == set(SamplingParams.__struct_fields__)


def test_other_options_reach_the_request() -> None:
    call = parse(
        n=3,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        stop=["a", "b", "c", "d"],
        logprobs=True,
        top_logprobs=20,
        top_k=-1,
        chat_template_kwargs={"enable_thinking": False},
    )
    assert (call.request.n, call.stream, call.include_usage) == (3, True, True)
    assert call.request.sampling.stop == ("a", "b", "c", "d")
    assert (call.request.sampling.top_logprobs, call.request.sampling.top_k) == (20, 0)
    assert call.request.template_kwargs == {"enable_thinking": False}


def test_a_negative_seed_is_a_seed_of_its_own() -> None:
    seeds = {parse(seed=seed).request.sampling.seed for seed in (-1, 1, -(2**63), 0)}
    assert len(seeds) == 3  # the smallest int64 folds onto 0
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("fields", "priority"),
    [
        ({"service_tier": "priority"}, Priority.HIGH),
        ({"service_tier": "fast"}, Priority.HIGH),
        ({"service_tier": "auto"}, Priority.NORMAL),
        ({"service_tier": "flex"}, Priority.LOW),
        ({"priority": -5}, Priority.HIGH),
        ({"priority": 0, "service_tier": "flex"}, Priority.NORMAL),
        ({"priority": 9}, Priority.LOW),
    ],
)
def test_priority_carriers(fields: dict[str, Any], priority: Priority) -> None:
    assert parse(**fields).priority is priority


def test_roles_and_parts_become_neutral_messages() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    assert parse_messages(
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "reasoning": "r", "audio": None},
    ) == (
        Message(role="system", content="d"),
        Message(role="user", content="ab", name="Ann"),
        Message(role="assistant", reasoning="hm", tool_calls=(ToolCall(id="c1", name="f", arguments='{"a":1}'),)),
        Message(role="tool", content="42", tool_call_id="c1"),
        Message(role="assistant", content="no", reasoning="r"),
    )


def test_deprecated_function_messages_are_read() -> None:
    assert parse_messages(
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
    ) == (
        Message(role="assistant", tool_calls=(ToolCall(id="", name="f", arguments="{}"),)),
        Message(role="tool", name="f", content="1"),
    )


BAD_VALUES: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": "hi"}, "messages", "invalid_type"),
    ({"messages": [3]}, "messages[0]", "invalid_type"),
    ({"messages": [USER, {"content": "x"}]}, "messages[1].role", "missing_required_parameter"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty_array"),
    (
        {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
        "messages[0].content[0].type",
        "missing_required_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type", "invalid_value"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
    ({"model": 5}, "model", "invalid_type"),
    ({"model": ""}, "model", "invalid_value"),
    ({"model": "x" * 1000}, "model", "string_above_max_length"),
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
    ({"temperature": 1e308}, "temperature", "decimal_above_max_value"),
    ({"top_p": 1.5}, "top_p", "decimal_above_max_value"),
    ({"min_p": -1}, "min_p", "decimal_below_min_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value"),
    ({"presence_penalty": 3}, "presence_penalty", "decimal_above_max_value"),
    ({"xtc_probability": 1.1}, "xtc_probability", "decimal_above_max_value"),
    ({"xtc_probability": -0.1}, "xtc_probability", "decimal_below_min_value"),
    ({"xtc_threshold": 0.6}, "xtc_threshold", "decimal_above_max_value"),
    ({"xtc_threshold": "low"}, "xtc_threshold", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": 10**40}, "max_tokens", "integer_above_max_value"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "integer_below_min_value"),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens", "invalid_value"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": 129}, "n", "integer_above_max_value"),
    ({"n": True}, "n", "invalid_type"),
    ({"seed": 2**63}, "seed", "integer_above_max_value"),
    ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
    ({"stop": [""]}, "stop", "invalid_value"),
    ({"stop": ["a", 1]}, "stop[1]", "invalid_type"),
    ({"stop": "x" * 5000}, "stop", "string_above_max_length"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "integer_below_min_value"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "decimal_above_max_value"),
    ({"logit_bias": {"1": "x"}}, "logit_bias", "invalid_type"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"service_tier": "gold"}, "service_tier", "invalid_value"),
    ({"tools": []}, "tools", "empty_array"),
    ({"chat_template_kwargs": {"a": 2**70}}, "chat_template_kwargs", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD_VALUES)
def test_bad_values_are_named(fields: dict[str, Any], param: str, code: str) -> None:
    assert refusal(fields) == (400, param, code)


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_missing_fields_are_named(missing: str) -> None:
    body = {"model": "m", "messages": [USER]}
    del body[missing]
    assert refusal(json.dumps(body).encode()) == (400, missing, "missing_required_parameter")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"{} {}",
        b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"m","messages":[],"extra":"\xc3\x28"}',
        b'{"model":"m","extra":"\\ud800"}',
        b'{"model":"m","temperature":NaN}',
        b'{"model":"m","temperature":Infinity}',
        b'{"model":"m","extra":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 100_000,
        '{"model":"m"}'.encode("utf-16"),
    ],
)
def test_what_is_not_one_json_object_in_utf8_is_refused(body: bytes) -> None:
    assert refusal(body) == (400, None, "invalid_json")


def test_a_byte_order_mark_is_tolerated() -> None:
    body = b"\xef\xbb\xbf" + json.dumps({"model": "m", "messages": [USER]}).encode()
    assert parse_chat(body, fallback_seed=7) == parse()


def test_a_number_too_large_for_a_double_is_named() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":1e999}'
    assert refusal(body) == (400, "temperature", "invalid_value")


def test_deeply_nested_template_arguments_are_refused() -> None:
    nested: dict[str, Any] = {}
    for _ in range(100):
        nested = {"a": nested}
    assert refusal({"chat_template_kwargs": nested}) == (400, "chat_template_kwargs", "invalid_value")


UNSUPPORTED: list[tuple[str, Any]] = [
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
    ("reasoning_effort", "low"),
    ("structured_outputs", {"json": {}}),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy"}),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("continue_final_message", True),
    ("echo", True),
    ("echo", 1),
    ("prompt_logprobs", 0),
    ("bad_words", ["x"]),
    ("allowed_token_ids", [1]),
    ("thinking_token_budget", 10),
    ("add_generation_prompt", False),
    ("skip_special_tokens", False),
    ("chat_template", "{{ x }}"),
]


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED)
def test_options_that_would_change_the_output_are_refused_by_name(name: str, value: Any) -> None:
    assert refusal({name: value}) == (400, name, "unsupported_parameter")


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_other_modalities_are_refused_by_place(kind: str) -> None:
    parts = [{"type": "text", "text": "look"}, {"type": kind, kind: {}}]
    body = {"messages": [{"role": "user", "content": parts}]}
    assert refusal(body) == (400, "messages[0].content[1]", "unsupported_parameter")


def test_usage_on_every_chunk_is_refused() -> None:
    body = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    assert refusal(body) == (400, "stream_options.continuous_usage_stats", "unsupported_parameter")


@pytest.mark.parametrize(("name", "harmless"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_harmless_values_of_refused_options_pass(name: str, harmless: Any) -> None:
    assert parse(**{name: harmless}).request == parse().request


def test_hints_are_accepted_and_unknown_fields_are_named() -> None:
    call = parse(**{name: {"a": 1} for name in HINTS}, frobnicate=[1], zeta="x" * 100)
    assert call.request == parse().request
    assert call.ignored == ("frobnicate", "zeta")


def test_the_list_of_unknown_names_is_bounded() -> None:
    ignored = parse(**{f"{position:04d}" + "x" * 500: 1 for position in range(500)}).ignored
    assert len(ignored) <= 16
    assert all(len(name) <= 64 for name in ignored)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)
wire_names = st.sampled_from(
    [*SAMPLING, *REFUSED, "n", "stream", "stream_options", "messages", "model", "service_tier"]
)


@given(st.dictionaries(wire_names, json_values, max_size=4))
def test_any_json_is_a_request_or_a_client_error(fields: dict[str, Any]) -> None:
    body = msgspec.json.encode({"model": "m", "messages": [USER]} | {k: v for k, v in fields.items() if _fits(v)})
    try:
        request = parse_chat(body, fallback_seed=7).request
    except SpillwayError as error:
        assert problem_of(error).status in (400, 404)
    else:
        assert decode_request(encode_request(request)) == request


@given(st.binary(max_size=64))
def test_any_bytes_are_a_client_error(body: bytes) -> None:
    with pytest.raises(ClientError):
        parse_chat(body, fallback_seed=7)


def _fits(value: Any) -> bool:
    try:
        msgspec.json.encode(value)
    except (OverflowError, UnicodeEncodeError):
        return False
    return True
