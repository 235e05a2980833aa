"""Takes the worker's frames from stdin and tokenizes prompts, on two threads beside the engine thread.

Two, so that a long prompt's tokenization holds up neither a cancel nor the worker that writes the next frame.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from scheduler.errors import InternalError, JobCancelled, SpillwayError
from scheduler.request import decode_request
from scheduler.telemetry import get_logger
from workers.backend import JobError
from workers.engine.chat_template import encode_prompt
from workers.engine.loader import LoadedModel
from workers.engine.protocol import HEADER, MAX_FRAME_BYTES, Cancel, Submit, ToEngine, decode_to_engine
from workers.engine.sequence import PreparedJob

_log = get_logger(__name__)
_MAX_WAITING = 1024

Order = PreparedJob | JobError | Cancel


class _NoFrame(Exception):
    """What was read is not what a worker of this version sends."""


class Intake:
    """Orders for the engine thread: one per Submit, in the worker's order, and the cancels of those already given.

    Called from the reader's thread: `on_end` when the stream ended, `on_garbage` when it is no stream of frames. Both
    must end the process: no order can be read any more.
    """

    def __init__(
        self, stream: BinaryIO, model: LoadedModel, *, on_end: Callable[[], None], on_garbage: Callable[[], None]
    ) -> None:
        self._stream = stream
        self._model = model
        self._on_end = on_end
        self._on_garbage = on_garbage
        self._orders: queue.Queue[Order] = queue.Queue(_MAX_WAITING)
        self._submits: queue.Queue[Submit] = queue.Queue(_MAX_WAITING)
        self._lock = threading.Lock()
        self._unprepared: dict[tuple[str, int], bool] = {}  # submitted and not yet an order; whether cancelled
        self._threads = [
            threading.Thread(target=self._read_all, name="intake", daemon=True),
            threading.Thread(target=self._prepare_all, name="tokenizer", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def take(self, timeout_s: float) -> list[Order]:
        """All orders that are there; waits up to `timeout_s` for the first."""
        orders: list[Order] = []
        try:
            orders.append(self._orders.get(timeout=timeout_s) if timeout_s > 0 else self._orders.get_nowait())
            while True:
                orders.append(self._orders.get_nowait())
        except queue.Empty:
            return orders

    def _read_all(self) -> None:
        try:
            self._take_in_all()
        except _NoFrame as error:
            _log.critical("the worker sent what is no frame; ending the engine", reason=str(error))
            self._on_garbage()
        else:
            self._on_end()

    def _take_in_all(self) -> None:
        while (message := self._read()) is not None:
            match message:
                case Submit():
                    with self._lock:
                        self._unprepared[message.job_id, message.attempt] = False
                    self._submits.put(message)
                case Cancel():
                    self._cancel(message)

    def _cancel(self, cancel: Cancel) -> None:
        key = cancel.job_id, cancel.attempt
        with self._lock:
            if key in self._unprepared:
                self._unprepared[key] = True
                return
        self._orders.put(cancel)

    def _prepare_all(self) -> None:
        while True:
            submit = self._submits.get()
            key = submit.job_id, submit.attempt
            order = self._prepare(submit) if not self._unprepared[key] else None
            with self._lock:  # a cancel that comes now must find the order given
                if self._unprepared.pop(key) or order is None:
                    order = JobError(*key, JobCancelled.code, "The job was cancelled.")
                self._orders.put(order)

    def _read(self) -> ToEngine | None:
        """The next frame; None at the end of the stream."""
        header = self._stream.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        (length,) = HEADER.unpack(header)
        if length > MAX_FRAME_BYTES:
            raise _NoFrame(f"it would have {length} bytes")
        payload = self._stream.read(length)
        if len(payload) < length:
            return None
        try:
            return decode_to_engine(payload)
        except msgspec.DecodeError as error:
            raise _NoFrame(str(error)) from error

    def _prepare(self, submit: Submit) -> PreparedJob | JobError:
        try:
            return self._prepared(submit)
        except SpillwayError as error:
            refusal = error
        except msgspec.ValidationError as error:
            refusal = InternalError(f"This worker cannot read the job's body: {error}")
        except Exception as error:
            _log.exception("tokenizing a prompt failed", job=submit.job_id)
            refusal = InternalError(f"Tokenizing the prompt failed: {type(error).__name__}: {error}")
        return JobError(submit.job_id, submit.attempt, refusal.code, refusal.message, refusal.param)

    def _prepared(self, submit: Submit) -> PreparedJob:
        request = decode_request(submit.body)
        return PreparedJob(
            job_id=submit.job_id,
            attempt=submit.attempt,
            prompt_ids=tuple(encode_prompt(self._model, request)),
            request=request,
            priority_rank=submit.priority_rank,
            progress=submit.progress,
            isolation=submit.isolation,
        )
