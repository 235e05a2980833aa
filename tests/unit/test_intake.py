"""A prompt whose tokenization takes long holds up no cancel, neither of another job nor its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import pytest

from scheduler.request import InferenceRequest, Message, encode_request
from workers.backend import JobError
from workers.engine.intake import Intake, Order
from workers.engine.loader import LoadedModel
from workers.engine.protocol import HEADER, MAX_FRAME_BYTES, Cancel, Submit, ToEngine, frame
from workers.engine.sequence import PreparedJob


class _SlowTokenizer:
    """Takes until `done` for a prompt that says so; a token per character."""

    has_chat_template = True
    _chat_template = "renders by itself"

    def __init__(self) -> None:
        self._tokenizer = self
        self.busy, self.done = threading.Event(), threading.Event()

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: object) -> str:
        text: str = messages[-1]["content"]
        if text == "slow":
            self.busy.set()
            assert self.done.wait(20)
        return text

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(char) for char in text]


class _Model:
    context_tokens = 100

    def __init__(self) -> None:
        self.tokenizer = _SlowTokenizer()


class _Stage:
    def __init__(self, intake: Intake, tokenizer: _SlowTokenizer, writing: int) -> None:
        self.tokenizer = tokenizer
        self._intake = intake
        self._writing = writing

    def send(self, *messages: ToEngine) -> None:
        os.write(self._writing, b"".join(map(frame, messages)))

    def take(self, count: int) -> list[Order]:
        orders: list[Order] = []
        while len(orders) < count:
            came = self._intake.take(20)
            assert came, f"only {orders}"
            orders += came
        return orders


@pytest.fixture(name="stage")
def _running() -> Iterator[_Stage]:
    reading, writing = os.pipe()
    model, ended = _Model(), threading.Event()
    with os.fdopen(reading, "rb") as stream:
        intake = Intake(stream, cast("LoadedModel", model), on_end=ended.set, on_garbage=pytest.fail)
        intake.start()
        yield _Stage(intake, model.tokenizer, writing)
        os.close(writing)
        assert ended.wait(20)


def _submit(job_id: str, text: str) -> Submit:
    request = InferenceRequest(model="m", messages=(Message(role="user", content=text),))
    return Submit(job_id, 1, encode_request(request))


def test_a_cancel_does_not_wait_for_the_prompt_before_it(stage: _Stage) -> None:
    stage.send(_submit("running", "a"))
    (running,) = stage.take(1)
    stage.send(_submit("long", "slow"), Cancel("running", 1))
    assert stage.tokenizer.busy.wait(20)
    assert isinstance(running, PreparedJob) and stage.take(1) == [Cancel("running", 1)]
    stage.tokenizer.done.set()
    (long,) = stage.take(1)
    assert isinstance(long, PreparedJob) and long.prompt_ids == tuple(map(ord, "slow"))


def test_a_job_cancelled_while_it_is_tokenized_never_starts_but_is_counted(stage: _Stage) -> None:
    stage.send(_submit("long", "slow"))
    assert stage.tokenizer.busy.wait(20)
    stage.send(_submit("behind", "slow"), Cancel("behind", 1), Cancel("long", 1), Cancel("gone", 1))
    assert stage.take(1) == [Cancel("gone", 1)]
    stage.send(_submit("next", "b"), Cancel("unknown", 1))
    assert stage.take(1) == [Cancel("unknown", 1)]
    stage.tokenizer.done.set()
    long, behind, following = stage.take(3)
    assert isinstance(long, JobError) and (long.job_id, long.code) == ("long", "cancelled")
    assert isinstance(behind, JobError) and behind.job_id == "behind"
    assert isinstance(following, PreparedJob) and following.job_id == "next"


@pytest.mark.parametrize(
    "garbage",
    [
        HEADER.pack(3) + b"\xc1\xc1\xc1",
        HEADER.pack(1) + b"\x01",
        HEADER.pack(MAX_FRAME_BYTES + 1),
        HEADER.pack(len(other := msgspec.msgpack.encode({"type": "dance"}))) + other,
    ],
    ids=["no msgpack", "a number", "too long", "an unknown order"],
)
def test_what_is_no_frame_is_reported_and_nothing_behind_it_is_read(garbage: bytes) -> None:
    reading, writing = os.pipe()
    garbled = threading.Event()
    os.write(writing, frame(Cancel("before", 1)) + garbage + frame(Cancel("behind", 1)))
    with os.fdopen(reading, "rb") as stream:
        intake = Intake(stream, cast("LoadedModel", _Model()), on_end=pytest.fail, on_garbage=garbled.set)
        intake.start()
        assert garbled.wait(20)
        assert intake.take(20) == [Cancel("before", 1)] and intake.take(0) == []
    os.close(writing)
