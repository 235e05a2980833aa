"""Answers as OpenAI's clients parse them: chunk order, one JSON per event, text intact, logprobs and usage."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from api.protocols.openai_chat_answer import DONE, ChunkEncoder, CompletionBuilder, CompletionHead, json_text
from scheduler.request import Usage
from scheduler.tokens import ChoiceDelta, Delta, PositionLogprobs, TokenLogprob

HEAD = CompletionHead(id="chatcmpl-1", created_s=1700000000, model='we"ird/model', service_tier="default")


def events(data: bytes) -> list[dict[str, Any]]:
    """The JSON of each SSE event; fails where anything but `data:` lines is there."""
    parts = data.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def text_delta(index: int, text: str, finish: Any = None) -> Delta:
    return Delta(choices=(ChoiceDelta(index=index, token_ids=(1,), text=text, finish_reason=finish),))


def test_the_role_comes_once_for_each_choice_in_order() -> None:
    chunks = events(ChunkEncoder(HEAD, n=3, include_usage=False).opening())
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 2]
    assert all(chunk["choices"][0]["delta"]["role"] == "assistant" for chunk in chunks)
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


def test_text_then_one_finish_chunk_with_an_empty_delta() -> None:
    encoder = ChunkEncoder(HEAD, n=1, include_usage=False)
    text, finish = events(encoder.delta(text_delta(0, "end", finish="length")))
    assert text["choices"][0]["delta"] == {"content": "end"}
    assert (text["choices"][0]["finish_reason"], finish["choices"][0]["finish_reason"]) == (None, "length")
    assert finish["choices"][0]["delta"] == {}
    assert encoder.unfinished == set()


def test_held_back_text_makes_no_chunk() -> None:
    assert ChunkEncoder(HEAD, n=1, include_usage=False).delta(text_delta(0, "")) == b""


def test_all_chunks_say_the_same_head_and_parse_as_the_sdk_types() -> None:
    encoder = ChunkEncoder(HEAD, n=2, include_usage=True)
    data = encoder.opening() + encoder.delta(text_delta(1, 'q"\n\u2028')) + encoder.delta(text_delta(0, "", "stop"))
    data += encoder.usage(Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1))
    chunks = events(data)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert (chunk["id"], chunk["created"], chunk["model"]) == (HEAD.id, HEAD.created_s, HEAD.model)
        assert chunk["object"] == "chat.completion.chunk"
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 5
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 1


def test_usage_is_absent_from_chunks_unless_asked_for() -> None:
    assert all("usage" not in chunk for chunk in events(ChunkEncoder(HEAD, n=1, include_usage=False).opening()))


def test_logprobs_ride_on_the_chunk_of_their_token() -> None:
    position = PositionLogprobs(
        chosen=TokenLogprob("é", -0.5, (195, 169)),
        top=(TokenLogprob("é", -0.5, (195, 169)), TokenLogprob("\u2028", float("-inf"), ())),
    )
    delta = Delta(choices=(ChoiceDelta(index=0, token_ids=(9,), text="é", logprobs=(position,)),))
    (chunk,) = events(ChunkEncoder(HEAD, n=1, include_usage=False).delta(delta))
    (item,) = chunk["choices"][0]["logprobs"]["content"]
    assert (item["token"], item["logprob"], item["bytes"]) == ("é", -0.5, [195, 169])
    assert item["top_logprobs"][1] == {"token": "\u2028", "logprob": -9999.0, "bytes": None}
    ChatCompletionChunk.model_validate(chunk, strict=True)


def test_the_whole_completion_gathers_every_choice() -> None:
    builder = CompletionBuilder(2)
    for delta in (text_delta(1, "b"), text_delta(0, "a"), text_delta(1, "c", "length"), text_delta(0, "", "stop")):
        builder.add(delta)
    assert builder.unfinished == []
    body = json.loads(builder.build(HEAD, Usage(prompt_tokens=1, completion_tokens=4), with_logprobs=False))
    ChatCompletion.model_validate(body, strict=True)
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a", "bc"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["total_tokens"] == 5


def test_a_choice_without_a_reason_is_seen() -> None:
    builder = CompletionBuilder(2)
    builder.add(text_delta(1, "b", "stop"))
    assert builder.unfinished == [0]


@given(st.text())
def test_text_is_one_line_for_every_line_reader_and_comes_back_whole(text: str) -> None:
    encoded = json_text(text)
    assert len(encoded.decode().splitlines()) == 1
    assert json.loads(encoded) == text


def test_done_is_the_last_event() -> None:
    assert DONE == b"data: [DONE]\n\n"
