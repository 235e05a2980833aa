"""Prompts are what the model's own template renders; what it cannot take is the client's error, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scheduler.errors import ContextLengthExceeded, InvalidRequest
from scheduler.request import InferenceRequest, Message, ToolCall
from tests.tiny_model import write_tiny_model
from workers.engine.chat_template import encode_prompt, render
from workers.engine.loader import LoadedModel, load

CONTEXT_TOKENS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context_tokens=CONTEXT_TOKENS)
    return load(path, str(path))


def _request(*messages: Message, **fields: Any) -> InferenceRequest:
    return InferenceRequest(model="tiny", messages=messages, **fields)


def _user(text: str) -> Message:
    return Message(role="user", content=text)


def test_prompt_ids_are_those_of_the_rendered_text(model: LoadedModel) -> None:
    request = _request(Message(role="system", content="Be brief."), _user("Zürich 🌊"))
    text = render(model.tokenizer, request)
    assert text == "<|start|>system\nBe brief.<|end|>\n<|start|>user\nZürich 🌊<|end|>\n<|start|>assistant\n"
    assert model.tokenizer.decode(encode_prompt(model, request)) == text


def test_thinking_is_left_to_the_model_unless_the_request_says_so(model: LoadedModel) -> None:
    assert not render(model.tokenizer, _request(_user("x"))).endswith("<think>")
    asked = _request(_user("x"), template_kwargs={"enable_thinking": True})
    assert render(model.tokenizer, asked).endswith("<think>")


def test_tool_calls_and_reasoning_reach_the_template_as_objects(model: LoadedModel) -> None:
    call = ToolCall(id="call-1", name="weather", arguments='{"city": "Paris"}')
    broken = ToolCall(id="call-2", name="clock", arguments="not json")
    request = _request(
        _user("x"),
        Message(role="assistant", content="", reasoning="look it up", tool_calls=(call, broken)),
        Message(role="tool", content="sunny", tool_call_id="call-1"),
    )
    text = render(model.tokenizer, request)
    assert "<think>look it up</think>" in text
    assert '<call>weather {"city": "Paris"}</call><call>clock "not json"</call>' in text


def test_the_templates_own_refusal_is_the_clients_error(model: LoadedModel) -> None:
    with pytest.raises(InvalidRequest, match="a tool message needs an id") as caught:
        encode_prompt(model, _request(Message(role="tool", content="x")))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "add_generation_prompt"])
def test_a_request_cannot_replace_the_template_or_its_mode(model: LoadedModel, name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        encode_prompt(model, _request(_user("x"), template_kwargs={name: "{{ 1 }}"}))


def test_a_template_that_fails_on_a_variable_is_the_clients_error(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m", template="{{ messages[0].content + depth }}")
    model = load(path, str(path))
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        encode_prompt(model, _request(_user("x"), template_kwargs={"depth": 3}))


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m", template=None)
    model = load(path, str(path))
    with pytest.raises(InvalidRequest, match="no chat template"):
        encode_prompt(model, _request(_user("x")))


def test_a_prompt_that_fills_the_context_names_both_numbers(model: LoadedModel) -> None:
    frame = len(encode_prompt(model, _request(_user(""))))
    fits, fills = "1" * (CONTEXT_TOKENS - frame - 1), "1" * (CONTEXT_TOKENS - frame)
    assert len(encode_prompt(model, _request(_user(fits)))) == CONTEXT_TOKENS - 1
    with pytest.raises(ContextLengthExceeded) as caught:
        encode_prompt(model, _request(_user(fills)))
    assert f"maximum context length is {CONTEXT_TOKENS} tokens" in caught.value.message
    assert f"resulted in {CONTEXT_TOKENS} tokens" in caught.value.message


def test_a_huge_prompt_is_refused_by_its_beginning(model: LoadedModel) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"resulted in about \d{7} tokens"):
        encode_prompt(model, _request(_user("1" * 2_000_000)))
