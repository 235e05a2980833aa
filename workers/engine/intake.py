"""Takes the worker's frames from stdin and tokenizes prompts, on a thread of its own beside the engine thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from scheduler.errors import InternalError, SpillwayError
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


class Intake:
    """Orders for the engine thread, in the order in which the worker gave them; one per Submit or Cancel frame."""

    def __init__(self, stream: BinaryIO, model: LoadedModel, on_end: Callable[[], None]) -> None:
        self._stream = stream
        self._model = model
        self._on_end = on_end
        self._orders: queue.Queue[Order] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self, timeout_s: float) -> list[Order]:
        """All orders that are there; waits up to `timeout_s` for the first."""
        orders: list[Order] = []
        try:
            orders.append(self._orders.get(timeout=timeout_s) if timeout_s > 0 else self._orders.get_nowait())
            while True:
                orders.append(self._orders.get_nowait())
        except queue.Empty:
            return orders

    def _run(self) -> None:
        while (message := self._read()) is not None:
            self._orders.put(self._prepare(message) if isinstance(message, Submit) else message)
        self._on_end()

    def _read(self) -> ToEngine | None:
        """The next frame; None at the end of the stream or where it is no stream of frames."""
        header = self._stream.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        (length,) = HEADER.unpack(header)
        if length > MAX_FRAME_BYTES:
            _log.critical("frame from the worker is too long", bytes=length)
            return None
        payload = self._stream.read(length)
        return decode_to_engine(payload) if len(payload) == length else None

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
        )
