"""The official openai SDK against the API: what its users rely on works, and errors are the classes they catch."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from scheduler.db.keys import KeyStore
from tests.api_stage import Stage, running_api_alone, wait_until


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_api_alone(tmp_path_factory.mktemp("sdk")) as stage:
        yield stage


@pytest.fixture
def client(stage: Stage) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stage.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
async def async_client(stage: Stage) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stage.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        yield client


def ask(script: dict[str, Any] | str, **fields: Any) -> dict[str, Any]:
    text = script if isinstance(script, str) else json.dumps(script)
    return {"model": "default", "messages": [{"role": "user", "content": text}], **fields}


def test_a_whole_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(**ask("one two three"), seed=7, max_completion_tokens=50, stop=["x"])
    assert answer.choices[0].message.content == "one two three "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == 3
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer._request_id is not None and answer._request_id.startswith("req_")
    assert (answer.model, answer.service_tier) == ("demo", "default")


async def test_the_async_client_streams(async_client: AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(
        **ask("one two three"), stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "one two three "
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_accumulator_puts_choices_together(client: OpenAI) -> None:
    with client.chat.completions.stream(
        **ask("a b"), n=2, logprobs=True, stream_options={"include_usage": True}
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert [choice.message.role for choice in final.choices] == ["assistant", "assistant"]
    assert [choice.message.content for choice in final.choices] == ["a b ", "a b "]
    assert [choice.finish_reason for choice in final.choices] == ["stop", "stop"]
    assert final.usage is not None and final.usage.completion_tokens == 4
    assert final.choices[0].logprobs is not None and final.choices[0].logprobs.content is not None
    assert [item.token for item in final.choices[0].logprobs.content] == ["a ", "b "]
    assert any(event.type == "content.done" for event in events)


def test_a_cut_off_answer_says_length(client: OpenAI) -> None:
    answer = client.chat.completions.create(**ask({"say": ["a"], "finish": "length"}))
    assert answer.choices[0].finish_reason == "length"


def test_extra_body_reaches_the_worker(client: OpenAI, stage: Stage) -> None:
    raw = client.chat.completions.with_raw_response.create(
        **ask("hi"), extra_body={"top_k": 5, "ignore_eos": True, "min_p": 0.1, "made_up_field": 1}, logit_bias={"3": 2}
    )
    sampling = stage.workers[0].requests[raw.headers["spillway-job"]].sampling
    assert (sampling.top_k, sampling.ignore_eos, sampling.min_p, sampling.logit_bias) == (5, True, 0.1, {3: 2.0})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "fields", "kind", "code"),
    [
        ("hi", {"model": "nope"}, openai.NotFoundError, "model_not_found"),
        ("hi", {"temperature": 5}, openai.BadRequestError, "decimal_above_max_value"),
        ("hi", {"response_format": {"type": "json_object"}}, openai.BadRequestError, "unsupported_parameter"),
        ({"fail": "context_length_exceeded"}, {}, openai.BadRequestError, "context_length_exceeded"),
        ({"fail": "internal_error"}, {}, openai.InternalServerError, "internal_error"),
    ],
)  # fmt: skip
def test_errors_are_the_classes_that_users_catch(
    client: OpenAI, script: Any, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{**ask(script), **fields, "stream": stream})
    assert caught.value.code == code
    assert caught.value.request_id is not None and caught.value.request_id.startswith("req_")
    assert caught.value.type is not None and caught.value.message


def test_a_job_that_failed_for_good_is_not_sent_again(stage: Stage) -> None:
    before = len(stage.workers[0].requests)
    with (
        OpenAI(base_url=f"{stage.url}/v1", api_key="unused", max_retries=2) as client,
        pytest.raises(openai.InternalServerError),
    ):
        client.chat.completions.create(**ask({"fail": "internal_error"}))
    assert len(stage.workers[0].requests) == before + 1


def test_a_failure_in_mid_stream_raises(client: OpenAI) -> None:
    script = {"say": ["a ", "b "], "fail": "internal_error", "pause_s": 0.05}
    seen = []
    with pytest.raises(openai.APIError, match="scripted internal_error"):
        for chunk in client.chat.completions.create(**ask(script), stream=True):
            seen.append(chunk.choices[0].delta.content)
    assert seen == ["", "a ", "b "]


def test_keep_alives_are_invisible(tmp_path_factory: pytest.TempPathFactory) -> None:
    with (
        running_api_alone(tmp_path_factory.mktemp("quiet"), keepalive_s=0.05) as stage,
        OpenAI(base_url=f"{stage.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(**ask({"say": ["a ", "b "], "pause_s": 0.3}), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "a b "


def test_closing_a_stream_cancels_the_job(client: OpenAI, stage: Stage) -> None:
    raw = client.chat.completions.with_raw_response.create(**ask({"say": ["a "], "hold": True}), stream=True)
    stream = raw.parse()
    next(iter(stream))
    stream.close()
    wait_until(lambda: stage.cancelled(raw.headers["spillway-job"]))


def test_an_async_timeout_cancels_the_job(stage: Stage) -> None:
    before = set(stage.workers[0].requests)
    with (
        OpenAI(base_url=f"{stage.url}/v1", api_key="unused", max_retries=0, timeout=0.5) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(**ask({"say": ["a "], "hold": True}))
    (job_id,) = set(stage.workers[0].requests) - before
    wait_until(lambda: stage.cancelled(job_id))


def test_text_of_every_script_arrives_whole(client: OpenAI) -> None:
    words = ["naïve ", "日本", "語 ", "🦆", "\u2028\x85\u2029", '"quoted" \\ ', "\n\n", "data: x\n\n", "\t"]
    stream = client.chat.completions.create(**ask({"say": words}), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "".join(words)
    assert client.chat.completions.create(**ask({"say": words})).choices[0].message.content == "".join(words)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "org/other-model"]
    assert client.models.retrieve("org/other-model").owned_by == "spillway"
    assert client.models.retrieve("default").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


def test_a_wrong_key_is_an_authentication_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_api_alone(tmp_path_factory.mktemp("keys")) as stage:
        _, secret = stage.call(KeyStore(stage.services.database).create("sdk"))
        with (
            OpenAI(base_url=f"{stage.url}/v1", api_key="sk-wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            stranger.models.list()
        assert caught.value.code == "invalid_api_key"
        with OpenAI(base_url=f"{stage.url}/v1", api_key=secret, max_retries=0) as client:
            assert client.chat.completions.create(**ask("hi")).choices[0].message.content == "hi "
