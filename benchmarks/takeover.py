"""How long a stream stands still when the process behind it is killed with -9: engine process, then whole worker.

    python -m benchmarks.takeover [--rounds 10] [--streams 8]

Two workers, `--streams` concurrent streams; after some text, the busier worker (or its engine) is killed.
The pause of a stream is its longest gap between two text events after the kill, re-prefill included. No peer does this,
so the numbers stand alone: median and range over all streams that moved to another attempt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import time
import urllib.request
from typing import Any, Literal

from benchmarks.servers import Server, spillway
from benchmarks.sse_client import StreamTiming, stream_chat

Victim = Literal["engine_pid", "pid"]


def _workers(server: Server) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/admin/workers", timeout=10) as answer:
        return json.load(answer)["data"]


def _is_running(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_for_two_workers(server: Server, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if sum(_is_running(w["pid"]) and _is_running(w["engine_pid"]) for w in _workers(server)) >= 2:
            return
        time.sleep(0.2)
    raise RuntimeError(f"fewer than two workers within {within_s} s")


def _body(number: int) -> dict[str, object]:
    messages = [{"role": "user", "content": f"Count from {100 + number} to {199 + number}"}]
    return {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 400, "min_tokens": 400}


async def _kill(server: Server, victim: Victim, after_s: float) -> float:
    await asyncio.sleep(after_s)
    alive = [worker for worker in await asyncio.to_thread(_workers, server) if _is_running(worker["engine_pid"])]
    os.kill(max(alive, key=lambda worker: worker["busy_rows"])[victim], signal.SIGKILL)
    return time.perf_counter()


def _pause_ms(timing: StreamTiming, killed_s: float) -> float:
    after = [(a, b) for a, b in zip(timing.text_at_s, timing.text_at_s[1:], strict=False) if b > killed_s]
    return 1000 * max((b - a for a, b in after), default=0.0)


async def _round(server: Server, victim: Victim, streams: int, number: int, after_s: float) -> list[float]:
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(stream_chat("127.0.0.1", server.port, _body(number * streams + i)))
            for i in range(streams)
        ]
        kill = group.create_task(_kill(server, victim, after_s))
    timings = [task.result() for task in tasks]
    failed = [timing.error for timing in timings if timing.error or not timing.done]
    if failed:
        raise RuntimeError(f"streams failed: {failed}")
    # a stream that was not on the victim has an ordinary gap as its longest one: far below a takeover
    ordinary_ms = 1000 * statistics.median(gap for timing in timings for gap in timing.gaps_s)
    pauses = [_pause_ms(timing, kill.result()) for timing in timings]
    return [pause for pause in pauses if pause > 20 * ordinary_ms]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--after-s", type=float, default=0.4)
    options = parser.parse_args()
    with spillway("demo", "--workers", "2") as server:
        victims: tuple[Victim, ...] = ("engine_pid", "pid")
        for victim in victims:
            pauses: list[float] = []
            for number in range(options.rounds):
                _wait_for_two_workers(server)
                pauses += asyncio.run(_round(server, victim, options.streams, number, options.after_s))
            name = "engine process" if victim == "engine_pid" else "whole worker"
            if not pauses:
                raise RuntimeError(f"{name}: no stream was running on the victim; raise --streams or lower --after-s")
            line = f"median {statistics.median(pauses):.0f} ms ({min(pauses):.0f}–{max(pauses):.0f})"
            print(f"{name} killed, {options.rounds} rounds, {len(pauses)} moved streams: pause {line}")


if __name__ == "__main__":
    main()
