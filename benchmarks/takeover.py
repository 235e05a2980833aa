"""How long a stream stands still when what computes it is gone: engine killed, whole worker killed, engine hung.

    python -m benchmarks.takeover [--rounds 5] [--streams 32] [--hang-s 2] [--only engine|worker|hang]

Two workers; once all streams run, the busier one's engine is killed with -9 (its parent sees the exit), or the worker
itself (its lease expires), or the engine is stopped (the parent's watchdog loses patience after 1.25 × --hang-s).
Per stream that moved: `elsewhere`, from the fault to the claim by another worker; for the hung engine also that without
the watchdog's patience; and `pause`, the longest gap between two text events after the fault, re-prefill included. No
peer does this, so the numbers stand alone: median and range over all rounds.
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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.servers import Server, spillway
from benchmarks.sse_client import StreamTiming, stream_chat

TOKENS = 200  # of each stream: long enough that all run at once
PATIENCE = 1.25  # of the parent, in units of SPILLWAY_ENGINE_HANG_S


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to which process of the busier worker, and what notices it."""

    name: str
    title: str
    victim: str
    number: signal.Signals


FAULTS = (
    Fault("engine", "engine process killed, noticed by its parent", "engine_pid", signal.SIGKILL),
    Fault("worker", "whole worker killed, noticed by its lease", "pid", signal.SIGKILL),
    Fault("hang", "engine hung, noticed by the watchdog", "engine_pid", signal.SIGSTOP),
)


@dataclass(frozen=True, slots=True)
class Takeover:
    """One stream that moved, ms from the fault to the next claim, and the pause that its client saw."""

    elsewhere_ms: float
    pause_ms: float


def _get(server: Server, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=10) as answer:
        return json.load(answer)


def _workers(server: Server) -> list[dict[str, Any]]:
    found = _get(server, "/admin/workers")["data"]
    return [worker for worker in found if _is_running(worker["pid"]) and _is_running(worker["engine_pid"])]


def _is_running(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_for(what: str, true: Any, within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} within {within_s} s")
        time.sleep(0.05)


def _body(number: int) -> dict[str, object]:
    messages = [{"role": "user", "content": f"Count from {100 + number} to {199 + number}"}]
    return {"model": "default", "messages": messages, "temperature": 0, "max_tokens": TOKENS, "min_tokens": TOKENS}


def _strike(server: Server, fault: Fault, streams: int) -> float:
    """Waits until all streams run, then does it; when (Unix ms)."""
    _wait_for("not all streams ran", lambda: sum(worker["busy_rows"] for worker in _workers(server)) >= streams)
    victim = max(_workers(server), key=lambda worker: worker["busy_rows"])
    os.kill(victim[fault.victim], fault.number)
    return time.time() * 1000


async def _round(server: Server, fault: Fault, streams: int, number: int) -> list[Takeover]:
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(stream_chat("127.0.0.1", server.port, _body(number * streams + position)))
            for position in range(streams)
        ]
        striking = group.create_task(asyncio.to_thread(_strike, server, fault, streams))
    timings = [task.result() for task in tasks]
    failed = [timing.error for timing in timings if timing.error or not timing.done]
    if failed:
        raise RuntimeError(f"streams failed: {failed}")
    seen = [_takeover(server, timing, striking.result()) for timing in timings]
    return [takeover for takeover in seen if takeover is not None]


def _takeover(server: Server, timing: StreamTiming, fault_ms: float) -> Takeover | None:
    later = [one for one in _get(server, f"/v1/jobs/{timing.job_id}")["attempts"] if one["started_ms"] > fault_ms]
    if not later:
        return None
    fault_s = time.perf_counter() - time.time() + fault_ms / 1000  # as the client's clock has it
    gaps = [b - a for a, b in zip(timing.text_at_s, timing.text_at_s[1:], strict=False) if b > fault_s]
    return Takeover(later[0]["started_ms"] - fault_ms, 1000 * max(gaps, default=0.0))


def _line(label: str, values: Sequence[float]) -> str:
    return f"{label} {statistics.median(values):,.0f} ms ({min(values):,.0f}–{max(values):,.0f})"


def _measure(server: Server, fault: Fault, rounds: int, streams: int, hang_s: float) -> None:
    seen: list[Takeover] = []
    for number in range(rounds):
        _wait_for("fewer than two workers", lambda: len(_workers(server)) >= 2)
        seen += asyncio.run(_round(server, fault, streams, number))
    if not seen:
        raise RuntimeError(f"{fault.name}: no stream ran on the victim")
    elsewhere = [one.elsewhere_ms for one in seen]
    parts = [_line("elsewhere after", elsewhere)]
    if fault.name == "hang":
        parts.append(_line("after it was detected", [ms - PATIENCE * hang_s * 1000 for ms in elsewhere]))
    parts.append(_line("pause", [one.pause_ms for one in seen]))
    print(f"{fault.title}: {rounds} rounds, {len(seen)} streams moved; {'; '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--hang-s", type=float, default=2.0)
    parser.add_argument("--only", choices=[fault.name for fault in FAULTS])
    options = parser.parse_args()
    for fault in FAULTS:
        if options.only not in (None, fault.name):
            continue
        if fault.name == "hang":  # the others on the default, so that a busy machine's slow step is no hang
            os.environ["SPILLWAY_ENGINE_HANG_S"] = str(options.hang_s)
        with spillway("demo", "--workers", "2") as server:
            _measure(server, fault, options.rounds, options.streams, options.hang_s)


if __name__ == "__main__":
    main()
