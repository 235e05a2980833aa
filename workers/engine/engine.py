"""The engine: one thread, one step at a time: land what the device did, launch the next thing, report meanwhile.

    step = land (wait for the launched step, record its tokens) → retire (rows that ended) → launch (prefill chunk or
    decode step, asynchronously) → report (text, stop strings, log-probabilities, while the device works)

Never more than one launch is in flight, so arrays are free to be updated in place; the host's work on step k overlaps
the device's on step k + 1. A row that a stop string ends has its one extra token thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

import mlx.core as mx

from scheduler.errors import EngineFailure, SpillwayError
from scheduler.histogram import Histogram
from scheduler.request import InferenceRequest, SamplingParams
from scheduler.telemetry import get_logger
from scheduler.tokens import ChoiceDelta
from workers.backend import BackendEvent, JobDone, JobError, JobProgress
from workers.engine import metal
from workers.engine.batch_scheduler import BatchLimits, BatchScheduler, Chunk, Decode, Idle, Prefill
from workers.engine.detokenizer import TextStream
from workers.engine.engine_config import EngineConfig
from workers.engine.engine_stats import EngineStats, waiting_ages
from workers.engine.flight import DecodeFlight, PrefillFlight, suspects_of
from workers.engine.job_check import check_job
from workers.engine.lane import Lane
from workers.engine.lane_choice import choose_lane
from workers.engine.loader import LoadedModel
from workers.engine.logprobs import LogprobReader
from workers.engine.page_setup import PageChoices
from workers.engine.sampler import NO_TOKEN
from workers.engine.sequence import JobRun, Phase, PreparedJob, Sequence, SequenceLimits, build_run
from workers.engine.slot_plan import longest_row

__all__ = ["Engine", "EngineConfig", "PreparedJob"]

_log = get_logger(__name__)
_WARM_PREFILL_TOKENS = 64
_PAGES_WAIT_S = 0.01  # with nothing to run, for pages that a join waits for


@dataclass(frozen=True, slots=True)
class _Landed:
    """A decode step's result on the host: batch row, sequence and token of every row that still wants it."""

    draws: list[tuple[int, Sequence, int]]
    logprobs: LogprobReader | None


class Engine:
    """All methods on the engine thread."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        metal.configure_device(wired_bytes=config.wired_limit_bytes, cache_bytes=config.metal_cache_bytes)
        self._loaded = loaded
        self.lane: Lane = choose_lane(
            loaded,
            max_rows=config.max_rows,
            pages=PageChoices(config.page_tokens, config.disk),
            kv_budget_bytes=config.kv_budget_bytes,
            compile_steps=config.compile,
        )
        self._limits = SequenceLimits(_context_that_fits(loaded, self.lane), loaded.eos_ids)
        self._scheduler = BatchScheduler(
            BatchLimits(
                max_rows=self.lane.max_rows,
                slot_tokens=self.lane.slot_tokens,
                stall_s=config.prefill_stall_ms / 1000,
                most_groups=self.lane.most_groups,
                batch_stall_s=max(config.batch_stall_ms, config.prefill_stall_ms) / 1000,
            )
        )
        self._runs: dict[tuple[str, int], JobRun] = {}
        self._flight: DecodeFlight | PrefillFlight | None = None
        self._events: list[BackendEvent] = []
        self._arrivals = 0
        self._counted = EngineStats()
        self._idle_work_failed = False

    @property
    def has_work(self) -> bool:
        return bool(self._events) or self._flight is not None or self._scheduler.has_work

    @property
    def max_rows(self) -> int:
        return self.lane.max_rows

    @property
    def context_tokens(self) -> int:
        """The model's context, or less where one row of it would not fit the KV budget."""
        return self._limits.context_tokens

    @property
    def kv_budget_tokens(self) -> int:
        return self.lane.slot_tokens

    @property
    def busy_rows(self) -> int:
        return self._scheduler.busy_rows

    @property
    def free_rows(self) -> int:
        return self._scheduler.free_rows

    @property
    def free_kv_tokens(self) -> int:
        return self._scheduler.free_slot_tokens

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    def stats(self) -> dict[str, float]:
        """Counters since start and present sizes, for metrics and the console."""
        scheduler = {"rows": self.busy_rows, "waiting": self.waiting}
        ages = waiting_ages(self._scheduler.waiting, time.perf_counter())
        return {**self._counted.counters(), **scheduler, **ages, **self.lane.stats()}

    def traits(self) -> dict[str, str | int]:
        """What the probes at load found of the model."""
        return self.lane.traits

    def histograms(self) -> dict[str, Histogram]:
        """Since start: token gaps, stalls by prefill, rows per step."""
        return self._counted.histograms()

    def close(self) -> None:
        """End what runs beside this thread; for engines that are not alone in their process."""
        self.lane.close()

    def check_integrity(self) -> None:
        """Raise AssertionError where pages, rows or lists do not balance."""
        self.lane.check_integrity()
        active = {id(sequence) for run in self._runs.values() for sequence in run.sequences if not sequence.closed}
        listed = [*self._scheduler.waiting, *self._scheduler.prefilling, *self._scheduler.running]
        assert {id(sequence) for sequence in listed if not sequence.closed} == active, "a sequence is lost or leaked"

    def warm_up(self) -> None:
        """Build what takes long and learn the prefill speed; before traffic."""
        self.lane.warm_up()
        prompt = (0,) * min(_WARM_PREFILL_TOKENS, self._limits.context_tokens - 1)
        job = PreparedJob("warm-up", 1, prompt, InferenceRequest(model=self._loaded.name, messages=()))
        (blank,) = build_run(job, self._limits, 0, self._new_text).sequences
        for _ in range(2):
            self.lane.begin(blank)
            started_s = time.perf_counter()
            chunks = (Chunk(blank, 0, blank.prefill_target),)
            mx.eval(self.lane.prefill(chunks))
            self._scheduler.observe_prefill(chunks, time.perf_counter() - started_s)
            self.lane.reset()

    def warm_next(self) -> bool:
        """While there is no work: prepare one more usual shape, in milliseconds; False when all are, or one failed.

        A shape that fails is not tried again here: a request that needs it tries it behind the isolation boundary.
        """
        try:
            return self.lane.warm_next()
        except Exception as error:  # nobody asked for it yet, e.g. a full disk where kernels are built
            if not self._idle_work_failed:
                _log.warning("what was to be prepared while idle failed; later failures are not logged", exc_info=error)
            self._idle_work_failed = True
            return False

    def add(self, job: PreparedJob) -> None:
        """Take a job; what is wrong with it comes out of the next step as a JobError."""
        self._arrivals += 1
        try:
            check_job(job, self._loaded.vocab_size, self._limits.context_tokens)
            run = build_run(job, self._limits, self._arrivals, self._new_text)
            gains = [delta for sequence in run.sequences if (delta := sequence.take_delta()) is not None]
        except SpillwayError as error:
            self._events.append(JobError(job.job_id, job.attempt, error.code, error.message, error.param))
            return
        except Exception as error:  # its tokenizer or stop strings, which nobody else shares
            self._tell_failure(job.job_id, job.attempt, error)
            return
        self._runs[job.job_id, job.attempt] = run
        for sequence in run.sequences:
            if not sequence.is_finished:
                self._wait(sequence)
        self._tell(run, gains)

    def cancel(self, job_id: str, attempt: int) -> None:
        """Free all that the job holds; no event of it follows. Unknown jobs are fine."""
        run = self._runs.pop((job_id, attempt), None)
        if run is not None:
            self._drop(run)
        self._events = [event for event in self._events if (event.job_id, event.attempt) != (job_id, attempt)]

    def step(self) -> list[BackendEvent]:
        """Advance by one launch; returns what became visible."""
        landed: _Landed | None = None
        try:
            landed = self._land()
            if landed is not None:
                metal.tidy(self._counted.decode_steps)
            self._retire()
            self._flight = self._launch()
        except Exception as error:  # the isolation boundary: whatever a forward pass raises costs only its culprit
            self._recover(error)
        if landed is not None:
            self._report(landed)
        events, self._events = self._events, []
        return events

    def _land(self) -> _Landed | None:
        """Wait for the launched step and record its tokens."""
        flight = self._flight
        match flight:
            case None:
                return None
            case PrefillFlight():
                self._land_prefill(flight)
                self._flight = None
                return None
            case DecodeFlight():
                tokens = flight.land()
                reader = None if flight.logprobs is None else LogprobReader(flight.logprobs, self._loaded.tokenizer)
                self._flight = None
        draws: list[tuple[int, Sequence, int]] = []
        for row, sequence in flight.rows:
            if sequence.phase is Phase.RUNNING and not sequence.is_finished:
                if tokens[row] == NO_TOKEN:
                    self._fail(self._runs[sequence.job_id, sequence.attempt], ArithmeticError("logits are not finite"))
                    continue
                sequence.record(tokens[row])
                self._scheduler.acquit(sequence)
                draws.append((row, sequence, tokens[row]))
        self._counted.decoded([sequence for _, sequence, _ in draws], time.perf_counter())
        return _Landed(draws, reader)

    def _land_prefill(self, flight: PrefillFlight) -> None:
        mx.eval(flight.arrays)
        tokens = sum(chunk.count for chunk in flight.chunks)
        seconds = time.perf_counter() - flight.launched_s
        self._counted.prefilled(tokens, seconds, held_up=self._scheduler.stall_s is not None)
        self._scheduler.observe_prefill(flight.chunks, seconds)
        for chunk in flight.chunks:
            chunk.sequence.prefilled = chunk.start + chunk.count

    def _retire(self) -> None:
        """Free the rows of sequences that ended, then of those that must make room."""
        self._leave([sequence for sequence in self._scheduler.running if sequence.is_finished])
        while (victim := self._scheduler.victim(self.lane.is_ready)) is not None:
            self.lane.vacate(victim)
            self._send_back(victim)
            self.lane.expect(victim)
            self._counted.preemptions += not self._scheduler.on_trial

    def _launch(self) -> DecodeFlight | PrefillFlight | None:
        for sequence in self._scheduler.admit(self.lane.is_ready):
            self.lane.begin(sequence)
            self._counted.cached_tokens += sequence.prefilled
        self._seat_ready()
        decision = self._scheduler.schedule()
        match decision:
            case Idle():
                self.lane.await_pages(_PAGES_WAIT_S)
                return None
            case Decode():
                return self.lane.decode()
            case Prefill(chunks):
                flight = PrefillFlight(chunks, [], time.perf_counter())
                self._flight = flight  # names the suspects, should the launch itself fail
                flight.arrays.extend(self.lane.prefill(chunks))
                return flight

    def _seat_ready(self) -> None:
        ready = [s for s in self._scheduler.prefilling if s.prefilled >= s.prefill_target]
        if ready:
            self.lane.seat(ready)
            for sequence in ready:
                self._scheduler.promote(sequence)

    def _report(self, landed: _Landed) -> None:
        """Text and stop strings of the landed step; a row whose text fails takes only its own job down."""
        gains: dict[tuple[str, int], list[ChoiceDelta]] = {}
        for row, sequence, token in landed.draws:
            key = (sequence.job_id, sequence.attempt)
            if key not in self._runs:
                continue
            try:
                delta = self._delta(landed.logprobs, row, sequence, token)
            except Exception as error:  # one row's tokenizer or text trouble is that row's
                self._fail(self._runs[key], error)
                continue
            if delta is not None:
                gains.setdefault(key, []).append(delta)
        for key, deltas in gains.items():
            if key in self._runs:
                self._tell(self._runs[key], deltas)

    def _delta(self, reader: LogprobReader | None, row: int, sequence: Sequence, token: int) -> ChoiceDelta | None:
        if reader is None or not sequence.params.logprobs or sequence.finish_reason == "stop":
            return sequence.take_delta()
        return sequence.take_delta((reader.read(row, token, sequence.params.top_logprobs),))

    def _tell(self, run: JobRun, gains: list[ChoiceDelta]) -> None:
        if gains:
            self._events.append(JobProgress(run.job_id, run.attempt, tuple(gains)))
        if run.is_done:
            self._events.append(JobDone(run.job_id, run.attempt, run.usage))
            del self._runs[run.job_id, run.attempt]
            self._counted.jobs_done += 1

    def _recover(self, error: Exception, suspects: Items[Sequence] | None = None) -> None:
        """A launch or its result failed: a lone suspect fails, several are retried in halves, the rest start over.

        Suspects are those of the launch in flight, or all with a row, unless the caller knows better.
        """
        flight, self._flight = self._flight, None
        if suspects is None:
            suspects = suspects_of(flight) or [*self._scheduler.prefilling, *self._scheduler.running]
        suspects = [sequence for sequence in suspects if not sequence.is_finished]
        _log.warning("a step failed", error=repr(error), rows=len(suspects))
        self._counted.failed_steps += 1
        for sequence in [*self._scheduler.prefilling, *self._scheduler.running]:
            if sequence.is_finished:
                self._scheduler.remove(sequence)
                sequence.phase = Phase.FINISHED
            else:
                self._send_back(sequence)
        self.lane.reset()
        if len(suspects) == 1:
            self._fail(self._runs[suspects[0].job_id, suspects[0].attempt], error)
        else:
            self._scheduler.accuse(suspects)

    def _send_back(self, sequence: Sequence) -> None:
        self._scheduler.send_back(sequence)
        sequence.waiting_since_s = time.perf_counter()

    def _wait(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)
        self.lane.expect(sequence)
        sequence.waiting_since_s = time.perf_counter()

    def _fail(self, run: JobRun, error: Exception) -> None:
        self._runs.pop((run.job_id, run.attempt), None)
        self._tell_failure(run.job_id, run.attempt, error)
        self._drop(run)

    def _tell_failure(self, job_id: str, attempt: int, error: Exception) -> None:
        _log.error("a job failed in the engine", job=job_id, error=repr(error))
        failure = EngineFailure(f"The engine failed on this request: {type(error).__name__}: {error}")
        self._counted.jobs_failed += 1
        self._events.append(JobError(job_id, attempt, failure.code, failure.message))

    def _drop(self, run: JobRun) -> None:
        self._leave([sequence for sequence in run.sequences if sequence.phase is not Phase.FINISHED])

    def _leave(self, sequences: Items[Sequence]) -> None:
        """Free what they hold. Where the lane fails at that, all others start over and none of them is suspected."""
        for sequence in sequences:
            self._scheduler.remove(sequence)
            sequence.phase = Phase.FINISHED
        try:
            for sequence in sequences:
                self.lane.vacate(sequence)
        except Exception as error:  # the isolation boundary: pages are written and evaluated on leaving
            self._recover(error, suspects=())

    def _new_text(self, params: SamplingParams) -> TextStream:
        return TextStream(self._loaded.tokenizer, params.stop, params.include_stop)


def _context_that_fits(loaded: LoadedModel, lane: Lane) -> int:
    """A row may not outgrow the whole KV budget: it ends with `length` where it would."""
    longest = longest_row(lane.slot_tokens)
    if longest < loaded.context_tokens:
        _log.warning(
            "the KV budget holds less than the model's context; longer prompts are refused and answers end there",
            model=loaded.name,
            context_tokens=loaded.context_tokens,
            kv_budget_tokens=longest,
        )
    return min(longest, loaded.context_tokens)
