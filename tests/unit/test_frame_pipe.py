"""Frames survive any cut, a slow reader pauses the writer without loss, and the watchdog ends what hangs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine import frame_writer
from workers.engine.frame_writer import FrameWriter
from workers.engine.protocol import HEADER, MAX_FRAME_BYTES, FromEngine, Loading, Step, frame
from workers.engine.watchdog import EXIT_HUNG
from workers.engine_pipe import FrameSplitter


@given(st.lists(st.text(max_size=200), max_size=8), st.lists(st.integers(0, 2000), max_size=12))
def test_frames_come_out_whole_wherever_the_stream_is_cut(texts: list[str], cuts: list[int]) -> None:
    stream = b"".join(frame(Loading(text)) for text in texts)
    borders = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    splitter = FrameSplitter()
    seen: list[FromEngine] = []
    for start, end in itertools.pairwise(borders):
        seen += splitter.feed(stream[start:end])
    assert seen == [Loading(text) for text in texts]


def test_a_stream_that_is_none_of_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="a frame of"):
        FrameSplitter().feed(HEADER.pack(MAX_FRAME_BYTES + 1))


def _step(number: int) -> Step:
    return Step(events=(), busy_rows=0, free_rows=0, free_kv_tokens=0, step_count=number, stats={"x" * 500: 1.0})


def test_a_reader_that_stops_pauses_the_engine_and_loses_nothing() -> None:
    reading, writing = os.pipe()
    paused = threading.Event()
    writer = FrameWriter(writing, on_gone=lambda: None)
    writer.start()
    count = 3 * frame_writer.MAX_WAITING

    def send_all() -> None:
        for number in range(count):
            writer.send(_step(number), while_paused=paused.set)

    sender = threading.Thread(target=send_all)
    sender.start()
    assert paused.wait(20)
    splitter, seen = FrameSplitter(), []
    while len(seen) < count:
        seen += splitter.feed(os.read(reading, 1 << 16))
    sender.join(20)
    assert [step.step_count for step in seen] == list(range(count))
    assert writer.drain(timeout_s=5)
    os.close(reading)


def test_a_reader_that_is_gone_is_noticed() -> None:
    reading, writing = os.pipe()
    gone = threading.Event()
    writer = FrameWriter(writing, on_gone=gone.set)
    writer.start()
    os.close(reading)
    writer.send(_step(0))
    assert gone.wait(20)
    os.close(writing)


_WATCHED = """
import sys, time
from workers.engine.watchdog import Watchdog
watchdog = Watchdog(0, hang_s=0.3)
watchdog.start()
watchdog.beat(rows_active=sys.argv[1] == "busy")
print("beating", flush=True)
time.sleep(float(sys.argv[2]))
"""


def _watched(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _WATCHED, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def test_no_step_while_rows_are_active_ends_the_process() -> None:
    with _watched("busy", "60") as process:
        assert process.wait(timeout=30) == EXIT_HUNG


def test_an_idle_engine_may_be_silent() -> None:
    with _watched("idle", "1.0") as process:
        assert process.wait(timeout=30) == 0


def test_a_parent_that_is_gone_ends_the_process_though_it_reads_nothing() -> None:
    with _watched("idle", "60") as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"beating\n"
        process.stdin.write(b"unread")
        process.stdin.close()
        assert process.wait(timeout=30) == 0
