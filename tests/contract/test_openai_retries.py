"""What the official openai SDK does with refusals that say when, or whether, to come again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion

from tests.api_stage import Stage, running_api_alone, wait_until
from tests.queue_cases import ask


@pytest.fixture
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_api_alone(tmp_path_factory.mktemp("retries")) as stage:
        yield stage


def order(stage: Stage, verb: str) -> None:
    assert stage.request("POST", f"/admin/queues/{verb}", {"pool": "demo"}).status == 200


def accepted(stage: Stage) -> int:
    return stage.call(stage.services.queue.counts()).get("accepted", 0)


def sdk(stage: Stage, max_retries: int) -> OpenAI:
    return OpenAI(base_url=f"{stage.url}/v1", api_key="unused", max_retries=max_retries, timeout=20)


def say_hi(client: OpenAI, stage: Stage, **fields: Any) -> ChatCompletion:
    return client.chat.completions.create(**stage.chat("hi") | fields)


@pytest.mark.parametrize("stream", [False, True])
def test_a_draining_pool_is_an_error_that_says_when_to_come_again(stage: Stage, stream: bool) -> None:
    order(stage, "drain")
    with sdk(stage, 0) as client, pytest.raises(openai.InternalServerError) as caught:
        say_hi(client, stage, stream=stream)
    error = caught.value
    assert (error.status_code, error.code, error.type) == (503, "pool_draining", "server_error")
    assert error.response.headers["retry-after"] == "1"
    assert "x-should-retry" not in error.response.headers
    assert accepted(stage) == 0


def test_a_client_that_comes_again_is_served_when_the_pool_is_back(stage: Stage) -> None:
    order(stage, "drain")
    with sdk(stage, 10) as client, ThreadPoolExecutor(1) as pool:
        before = _refusals(stage)
        answer = pool.submit(say_hi, client, stage)
        wait_until(lambda: _refusals(stage) > before)
        order(stage, "resume")
        assert answer.result(timeout=30).choices[0].message.content == "hi "
    assert accepted(stage) == 1


def _refusals(stage: Stage) -> float:
    """Requests that this API answered 503."""
    lines = stage.request("GET", "/metrics").body.decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if 'status="503"' in line and "_total{" in line)


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_that_waited_out_the_queue_is_told_and_not_sent_again(stage: Stage, stream: bool) -> None:
    order(stage, "pause")
    with sdk(stage, 2) as client, ThreadPoolExecutor(1) as pool:
        answer: Future[ChatCompletion] = pool.submit(say_hi, client, stage, stream=stream)
        wait_until(lambda: stage.live_jobs())
        (job_id,) = stage.live_jobs()
        deadlines = stage.services.queue.keys.of("deadlines")
        stage.call(ask(stage.services.redis, "ZADD", deadlines, int(time.time() * 1000) - 5, job_id))
        with pytest.raises(openai.InternalServerError) as caught:
            answer.result(timeout=30)
    error = caught.value
    assert (error.status_code, error.code, error.type) == (504, "queue_timeout", "server_error")
    assert error.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in error.response.headers and error.message
    assert (accepted(stage), stage.job(job_id)["state"]) == (1, "expired")
