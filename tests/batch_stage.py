"""The API stage with a real scheduler process beside it: what tests of batches stand on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types import Batch

from tests.api_stage import Stage, running_api_alone, wait_until

CHAT = "/v1/chat/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}


class SchedulerProcess:
    """`spillway scheduler` on a stage's home and Redis."""

    def __init__(self, stage: Stage) -> None:
        given = {name: text for name, text in os.environ.items() if not name.startswith("SPILLWAY_")}
        chosen = stage.settings.as_environment()
        chosen.pop("SPILLWAY_PARENT_PIPE")
        self._environment = {**given, **chosen}
        self._log = stage.settings.home / "scheduler.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        began = self.said().count("scheduler runs")
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "api.cli", "scheduler"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        wait_until(lambda: self.said().count("scheduler runs") > began, within_s=60)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def said(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""


@contextmanager
def running_batches(folder: Path, *, workers: int = 1, **settings: Any) -> Iterator[tuple[Stage, SchedulerProcess]]:
    """A stage of its own with its scheduler."""
    with running_api_alone(folder, workers=workers, **settings) as stage:
        scheduler = SchedulerProcess(stage)
        scheduler.start()
        try:
            yield stage, scheduler
        finally:
            scheduler.kill()
        assert "Traceback" not in scheduler.said(), scheduler.said()


@contextmanager
def sdk(stage: Stage) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stage.url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client


def line(custom_id: str, script: dict[str, Any] | str, **body: Any) -> dict[str, Any]:
    """A line whose worker follows `script`."""
    text = script if isinstance(script, str) else json.dumps(script)
    whole = {"model": "demo", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": whole}


def jsonl(lines: list[Any]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in lines)


def submit(client: OpenAI, content: bytes, **fields: Any) -> Batch:
    """Upload this file and make a batch of it."""
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **fields)


def until(client: OpenAI, batch: Batch, condition: Callable[[Batch], object], within_s: float = 30.0) -> Batch:
    """The batch as soon as it is so."""
    seen: list[Batch] = []

    def look() -> bool:
        seen[:] = [client.batches.retrieve(batch.id)]
        return bool(condition(seen[0]))

    with contextlib.suppress(AssertionError):
        wait_until(look, within_s)
        return seen[0]
    raise AssertionError(f"not within {within_s} s; the batch is {seen}")


def ended(client: OpenAI, batch: Batch, within_s: float = 30.0) -> Batch:
    return until(client, batch, lambda now: now.status in ENDED, within_s)


def count(batch: Batch) -> tuple[int, int, int]:
    """Total, completed, failed."""
    counts = batch.request_counts
    assert counts is not None
    return counts.total, counts.completed, counts.failed


def read(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """A file of results by custom_id; no line comes twice."""
    assert file_id is not None
    lines = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    found = {entry["custom_id"]: entry for entry in lines}
    assert len(found) == len(lines)
    return found


def text_of(entry: dict[str, Any]) -> str:
    return entry["response"]["body"]["choices"][0]["message"]["content"]
