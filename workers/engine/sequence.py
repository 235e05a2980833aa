"""One choice of one job as the engine runs it, and the job that its choices belong to.

Pure state: what was prompted, what was drawn, what may be shown, why it ended. The engine thread is the only user.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from scheduler.request import InferenceRequest, SamplingParams, Usage
from scheduler.tokens import ChoiceDelta, FinishReason, PositionLogprobs
from workers.backend import ChoiceProgress

OVERTAKINGS_PER_CLASS = 16


class TextOutput(Protocol):
    """Turns token ids into text that may be shown; see `detokenizer.TextStream`."""

    stopped: bool

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A tokenised job, ready for the engine thread. `priority_rank` 0 is the highest class."""

    job_id: str
    attempt: int
    prompt_ids: tuple[int, ...]
    request: InferenceRequest
    priority_rank: int = 1
    progress: tuple[ChoiceProgress, ...] = ()
    isolation: str = ""  # who may share KV with it: those with the same tag


class Phase(enum.Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice: prompt, drawn tokens, text, and where its KV lives.

    `emitted` holds the visible tokens of all attempts; a token that ends the sequence by its id (eos or a stop
    token) is neither emitted nor counted. `prefilled` counts the leading tokens whose KV is computed.
    """

    job_id: str
    attempt: int
    index: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    text: TextOutput
    token_limit: int
    stop_ids: frozenset[int]
    priority_rank: int = 1
    arrival: int = 0
    isolation: str = ""
    emitted: list[int] = field(default_factory=list[int])
    block_table: list[int] = field(default_factory=list[int])
    phase: Phase = Phase.WAITING
    prefilled: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    closed: bool = False  # its last delta, the one with the finish reason, was taken
    overtaken: int = 0  # times that later arrivals got in before it, or that it was sent back
    waiting_since_s: float = 0.0  # by the engine's clock
    drawn_at_s: float = 0.0  # when its newest token came; 0: none yet in this row
    _unshown: list[int] = field(default_factory=list[int])
    _held_text: str = ""

    @property
    def tokens(self) -> list[int]:
        """Everything the model reads: the prompt, then what was drawn."""
        return [*self.prompt_ids, *self.emitted]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.emitted)

    @property
    def service_rank(self) -> int:
        """Its class, raised by one for every so many times that it was overtaken."""
        return self.priority_rank - self.overtaken // OVERTAKINGS_PER_CLASS

    @property
    def prefill_target(self) -> int:
        """Tokens to prefill; the last token is the input of the first decode step."""
        return self.length - 1

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def replay(self, progress: ChoiceProgress) -> None:
        """Take over what earlier attempts showed: tokens become emitted, the text stream is brought to their state."""
        shown = "".join([self.text.push(token) for token in progress.token_ids])
        self.emitted.extend(progress.token_ids)
        if shown.startswith(progress.text):
            self._held_text = shown[len(progress.text) :]
        if self.text.stopped:
            self.finish_reason = "stop"
        elif len(self.emitted) >= self.token_limit:
            self.finish_reason = "length"

    def record(self, token: int) -> None:
        """Take a drawn token; decides the ends that need no text, so that no further step is spent on the row."""
        if token in self.stop_ids:
            self.finish_reason = "stop"
            return
        self.emitted.append(token)
        self._unshown.append(token)
        if len(self.emitted) >= self.token_limit:
            self.finish_reason = "length"

    def take_delta(self, logprobs: tuple[PositionLogprobs, ...] = ()) -> ChoiceDelta | None:
        """What became visible since the last call; decides the end by a stop string."""
        token_ids = tuple(self._unshown)
        self._unshown.clear()
        text = self._held_text + "".join([self.text.push(token) for token in token_ids])
        self._held_text = ""
        if self.text.stopped:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            text += self.text.flush()
            if self.text.stopped:
                self.finish_reason = "stop"
        if not token_ids and not text and self.finish_reason is None:
            return None
        self.closed = self.finish_reason is not None
        return ChoiceDelta(self.index, token_ids, text, self.finish_reason, logprobs)


@dataclass(slots=True, eq=False)
class JobRun:
    """A job in the engine: its unfinished choices and the account of all of them."""

    job_id: str
    attempt: int
    prompt_tokens: int
    sequences: list[Sequence]
    done_before_tokens: int = 0  # visible tokens of choices that an earlier attempt finished

    @property
    def is_done(self) -> bool:
        return all(sequence.closed for sequence in self.sequences)

    @property
    def usage(self) -> Usage:
        """Tokens over all attempts; cached tokens are those of the choice that prefilled first."""
        drawn = sum(len(sequence.emitted) for sequence in self.sequences)
        cached = self.sequences[0].cached_tokens if self.sequences else 0
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.done_before_tokens + drawn,
            cached_tokens=min(cached, self.prompt_tokens),
        )


@dataclass(frozen=True, slots=True)
class SequenceLimits:
    """What the model allows."""

    context_tokens: int
    eos_ids: frozenset[int]


def build_run(
    job: PreparedJob, limits: SequenceLimits, arrival: int, new_text: Callable[[SamplingParams], TextOutput]
) -> JobRun:
    """The job's unfinished choices as sequences, earlier attempts replayed."""
    params = job.request.sampling
    room = limits.context_tokens - len(job.prompt_ids)
    stop_ids = frozenset(params.stop_token_ids) | (frozenset[int]() if params.ignore_eos else limits.eos_ids)
    before = {choice.index: choice for choice in job.progress}
    run = JobRun(job.job_id, job.attempt, len(job.prompt_ids), [])
    for index in range(job.request.n):
        progress = before.get(index)
        if progress is not None and progress.finish_reason is not None:
            run.done_before_tokens += len(progress.token_ids)
            continue
        sequence = Sequence(
            job_id=job.job_id,
            attempt=job.attempt,
            index=index,
            prompt_ids=job.prompt_ids,
            params=params,
            text=new_text(params),
            token_limit=room if params.max_tokens is None else min(params.max_tokens, room),
            stop_ids=stop_ids,
            priority_rank=job.priority_rank,
            arrival=arrival,
            isolation=job.isolation,
        )
        sequence.replay(progress if progress is not None else ChoiceProgress(index))
        run.sequences.append(sequence)
    return run


def in_service_order(sequences: Iterable[Sequence]) -> list[Sequence]:
    """Highest class first, then what has begun its answer, then first come, then lowest choice."""
    return sorted(sequences, key=lambda s: (s.service_rank, not s.emitted, s.arrival, s.index))
