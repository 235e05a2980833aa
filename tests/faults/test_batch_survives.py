"""A batch of 5,000 lines on the demo model, while every process of the service is killed with -9 at random moments.

`SPILLWAY_SOAK_LINES` and `SPILLWAY_SOAK_SEED` choose another size and another order of kills.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.batch_stage import CHAT, ENDED, count, jsonl, read, text_of
from tests.service import Service, running, wait_until_workers

LINES = int(os.environ.get("SPILLWAY_SOAK_LINES", "5000"))
SEED = int(os.environ.get("SPILLWAY_SOAK_SEED", "7"))
PROMPTS = 40
PAUSE_S = (4.0, 12.0)
# How each kind of process is told apart, by the words of its command line.
ROLES = ("redis_guard.py", "redis-server", "workers.engine", "workers local", "api.cli scheduler", "api.cli api")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(tmp_path / "home", "--model", "demo", "--workers", "2") as service:
        wait_until_workers(service, 2)
        yield service


def role_of(process: psutil.Process) -> str | None:
    try:
        command = " ".join(process.cmdline()[:5])
    except psutil.Error:
        return None
    return next((role for role in ROLES if role in command), None)


class Killer(threading.Thread):
    """Kills one process of the service after another, each kind in turn of a random order."""

    def __init__(self, service: Service) -> None:
        super().__init__(daemon=True)
        self.killed: Counter[str] = Counter()
        self._service = service
        self._rng = random.Random(SEED)
        self._enough = threading.Event()

    def run(self) -> None:
        while not self._enough.wait(self._rng.uniform(*PAUSE_S)):
            self._kill(min(ROLES, key=lambda role: (self.killed[role], self._rng.random())))

    def stop(self) -> None:
        self._enough.set()
        self.join()

    def _kill(self, role: str) -> None:
        family = psutil.Process(self._service.process.pid).children(recursive=True)
        fitting = [process for process in family if role_of(process) == role]
        if fitting:
            self._rng.choice(fitting).kill()
            self.killed[role] += 1


def requests() -> list[dict[str, Any]]:
    rng = random.Random(SEED)
    words = ["heron", "pebble", "lantern", "quartz", "willow", "copper", "ember", "fjord", "marble", "thistle"]
    prompts = [f"Repeat after me: {rng.choice(words)} {rng.choice(words)} {n}" for n in range(PROMPTS)]
    return [
        {"model": "demo", "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        for text in prompts
    ]


def patiently(client: OpenAI, batch_id: str, within_s: float) -> Batch:
    """The batch at its end, read from a service that is away now and then."""
    give_up = time.monotonic() + within_s
    seen: Batch | None = None
    while time.monotonic() < give_up:
        try:
            seen = client.batches.retrieve(batch_id)
        except (openai.APIConnectionError, openai.InternalServerError):
            time.sleep(0.2)
            continue
        if seen.status in ENDED:
            return seen
        time.sleep(0.5)
    raise AssertionError(f"not within {within_s:g} s: {seen}")


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_batch_survives_the_death_of_every_process(service: Service) -> None:
    bodies = requests()
    with OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        alone = [client.chat.completions.create(**body).choices[0].message.content for body in bodies]
        lines = [
            {"custom_id": f"n{n}", "method": "POST", "url": CHAT, "body": bodies[n % PROMPTS]} for n in range(LINES)
        ]
        file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        killer = Killer(service)
        began = time.monotonic()
        killer.start()
        try:
            batch = patiently(client, batch.id, within_s=3600)
        finally:
            killer.stop()
        took_s = time.monotonic() - began
        wait_until_workers(service, 1)
        print(json.dumps({"lines": LINES, "seconds": round(took_s), "killed": killer.killed, "seed": SEED}))
        found = read(client, batch.output_file_id)
        assert (batch.status, count(batch)) == ("completed", (LINES, LINES, 0))
        assert len({entry["id"] for entry in found.values()}) == LINES
        assert {name: text_of(entry) for name, entry in found.items()} == {
            f"n{n}": alone[n % PROMPTS] for n in range(LINES)
        }
    assert killer.killed, "nothing died: the test proved nothing"
