"""What the stack benchmark asks of a server: prompts of exact lengths, streams in bursts, and one turn's figures."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from benchmarks.servers import Server
from benchmarks.sse_client import StreamTiming, stream_chat

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of `prompt_tokens`, the first `shared_tokens` of them the same for all of a turn (`warmed`: sent once
    before it) or of a burst; answers of `output_tokens`.
    """

    title: str
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    warmed: bool = False


WORKLOADS = {
    "short": Workload("prompt 32, output 64, nothing shared", 32, 64),
    "shared": Workload("1k prefix that was sent once before, tails of 32, output 16", 1056, 16, 1024, warmed=True),
    "shared-cold": Workload("1k prefix that is new with each burst, tails of 32, output 16", 1056, 16, 1024),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One server, one workload, one number of streams, once. Times in milliseconds; what each stream said."""

    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    tokens_per_event: float
    said: tuple[str, ...]


class Prompts:
    """Writes messages whose prompt, chat template included, has an exact number of tokens."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        texts = (tokenizer.decode([token]) for token in range(len(tokenizer.vocab)))
        words = [text for text in texts if text[:1] == " " and text[1:].isalpha() and text.isascii()]
        self._words = [word for word in words if len(tokenizer.encode(word.strip())) == 1]

    def write(self, workload: Workload, prefix: object, tail: object) -> Messages:
        """The same `prefix` and `tail` give the same words, any other ones others."""
        shared: Messages = []
        if workload.shared_tokens:
            shared = self._filled([], "system", workload.shared_tokens, f"prefix {prefix}")
        return self._filled(shared, "user", workload.prompt_tokens, f"tail {prefix} {tail}")

    def _filled(self, before: Messages, role: str, tokens: int, seed: str) -> Messages:
        closed = role == "user"
        room = tokens - self._count([*before, {"role": role, "content": ""}], closed)
        content = "".join(random.Random(seed).choices(self._words, k=room)).strip()
        messages = [*before, {"role": role, "content": content}]
        if self._count(messages, closed) != tokens:
            raise RuntimeError(f"a prompt of {tokens} tokens came out with {self._count(messages, closed)}")
        return messages

    def _count(self, messages: Messages, closed: bool) -> int:
        return len(self._tokenizer.apply_chat_template(messages, add_generation_prompt=closed, return_dict=False))


def run_turn(server: Server, workload: Workload, prompts: Prompts, streams: int, number: int) -> Turn:
    """Bursts of `streams` requests, each burst sent at once when the last one has ended; turn `number` says what."""
    return asyncio.run(_bursts(server, workload, prompts, streams, number))


async def _bursts(server: Server, workload: Workload, prompts: Prompts, streams: int, number: int) -> Turn:
    if workload.warmed:
        await _burst(server, workload, [prompts.write(workload, (streams, number), "before")])
    timings: list[StreamTiming] = []
    wall_s = 0.0
    for burst in range(max(2, min(16, 64 // streams))):
        prefix = (streams, number) if workload.warmed else (streams, number, burst)
        asked = [prompts.write(workload, prefix, (burst, stream)) for stream in range(streams)]
        started_s = time.perf_counter()
        timings += await _burst(server, workload, asked)
        wall_s += time.perf_counter() - started_s
    return _summarise(timings, wall_s)


async def _burst(server: Server, workload: Workload, asked: list[Messages]) -> list[StreamTiming]:
    body = {"model": server.model, "temperature": 0, "max_tokens": workload.output_tokens}
    timings = await asyncio.gather(
        *(stream_chat("127.0.0.1", server.port, {**body, "messages": messages}) for messages in asked)
    )
    for timing in timings:
        _check(server, workload, timing)
    return timings


def _check(server: Server, workload: Workload, timing: StreamTiming) -> None:
    if timing.error or not timing.done or not timing.text_at_s:
        raise RuntimeError(f"{server.label}: a stream failed: {timing.error or 'no [DONE]'}")
    lengths = (timing.prompt_tokens, timing.completion_tokens)
    if lengths != (workload.prompt_tokens, workload.output_tokens) or timing.finish_reason != "length":
        raise RuntimeError(f"{server.label}: {lengths} tokens and an end by {timing.finish_reason!r} in {workload}")


def _summarise(timings: list[StreamTiming], wall_s: float) -> Turn:
    ttft = [1000 * timing.ttft_s for timing in timings]
    gaps = [1000 * gap for timing in timings for gap in timing.gaps_s]
    tokens = sum(timing.completion_tokens for timing in timings)
    return Turn(
        tokens_per_s=tokens / wall_s,
        ttft_p50_ms=_percentile(ttft, 0.5),
        ttft_p99_ms=_percentile(ttft, 0.99),
        gap_p50_ms=_percentile(gaps, 0.5),
        gap_p99_ms=_percentile(gaps, 0.99),
        tokens_per_event=tokens / sum(len(timing.text_at_s) for timing in timings),
        said=tuple(timing.text for timing in timings),
    )


def _percentile(values: Iterable[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")
