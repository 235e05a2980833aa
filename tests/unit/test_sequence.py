"""A sequence's life without a model: recording, ends, deltas, replay, and the job's account."""

from __future__ import annotations

from scheduler.request import InferenceRequest, SamplingParams
from workers.backend import ChoiceProgress
from workers.engine.sequence import JobRun, PreparedJob, Sequence, SequenceLimits, build_run, in_service_order


class Letters:
    """Token n is the n-th letter; the text holds back one letter until the next comes; "z" stops."""

    def __init__(self) -> None:
        self.stopped = False
        self._held = ""

    def push(self, token_id: int) -> str:
        shown, self._held = self._held, chr(ord("a") + token_id)
        self.stopped = self._held == "z"
        return shown

    def flush(self) -> str:
        return self._held


LIMITS = SequenceLimits(context_tokens=20, eos_ids=frozenset({9}))


def _run(params: SamplingParams, *, n: int = 1, progress: tuple[ChoiceProgress, ...] = ()) -> JobRun:
    request = InferenceRequest(model="m", messages=(), sampling=params, n=n)
    return build_run(PreparedJob("job", 1, (1, 2, 3), request, 1, progress), LIMITS, 1, lambda _: Letters())


def _sequence(params: SamplingParams, progress: ChoiceProgress | None = None) -> Sequence:
    (sequence,) = _run(params, progress=() if progress is None else (progress,)).sequences
    return sequence


def test_held_back_text_comes_with_the_next_token_or_at_the_end() -> None:
    sequence = _sequence(SamplingParams(max_tokens=2))
    sequence.record(0)
    first = sequence.take_delta()
    assert first is not None and (first.token_ids, first.text, first.finish_reason) == ((0,), "", None)
    sequence.record(1)
    last = sequence.take_delta()
    assert last is not None and (last.token_ids, last.text, last.finish_reason) == ((1,), "ab", "length")
    assert sequence.closed


def test_an_end_token_is_not_emitted() -> None:
    sequence = _sequence(SamplingParams())
    sequence.record(0)
    sequence.record(9)
    delta = sequence.take_delta()
    assert delta is not None and (delta.token_ids, delta.text, delta.finish_reason) == ((0,), "a", "stop")


def test_a_stop_string_beats_the_length() -> None:
    sequence = _sequence(SamplingParams(max_tokens=1))
    sequence.record(25)
    delta = sequence.take_delta()
    assert delta is not None and delta.finish_reason == "stop"


def test_without_max_tokens_the_context_is_the_limit() -> None:
    assert _sequence(SamplingParams()).token_limit == 17
    assert _sequence(SamplingParams(max_tokens=1000)).token_limit == 17


def test_replay_brings_the_text_to_where_it_was() -> None:
    sequence = _sequence(SamplingParams(max_tokens=4), ChoiceProgress(0, (0, 1), "a"))
    assert sequence.tokens == [1, 2, 3, 0, 1] and sequence.prefill_target == 4
    assert sequence.take_delta() is None
    sequence.record(2)
    delta = sequence.take_delta()
    assert delta is not None and (delta.token_ids, delta.text) == ((2,), "b")


def test_replay_shows_text_that_earlier_attempts_drew_but_did_not_show() -> None:
    sequence = _sequence(SamplingParams(max_tokens=9), ChoiceProgress(0, (0, 1, 2), "a"))
    delta = sequence.take_delta()
    assert delta is not None and (delta.token_ids, delta.text) == ((), "b")


def test_the_account_counts_finished_choices_of_earlier_attempts() -> None:
    run = _run(SamplingParams(max_tokens=4), n=3, progress=(ChoiceProgress(1, (4, 5), "ef", "stop"),))
    assert [sequence.index for sequence in run.sequences] == [0, 2]
    run.sequences[0].record(1)
    assert (run.usage.prompt_tokens, run.usage.completion_tokens) == (3, 3)
    assert not run.is_done


def test_service_order_is_class_then_arrival_then_choice() -> None:
    runs = [_sequence(SamplingParams()) for _ in range(4)]
    for sequence, (rank, arrival, index) in zip(runs, [(1, 1, 0), (0, 5, 0), (1, 0, 1), (1, 0, 0)], strict=True):
        sequence.priority_rank, sequence.arrival, sequence.index = rank, arrival, index
    assert in_service_order(runs) == [runs[1], runs[3], runs[2], runs[0]]
