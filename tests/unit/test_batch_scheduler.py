"""Who runs next, without a model: admission, chunk budgets, alternation, preemption, suspects."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.request import SamplingParams
from workers.engine.batch_scheduler import BatchLimits, BatchScheduler, Chunk, Decode, Idle, Prefill
from workers.engine.prefill_budget import MAX_CHUNK_TOKENS, MIN_CHUNK_TOKENS, MIN_IDLE_CHUNK_TOKENS
from workers.engine.sequence import OVERTAKINGS_PER_CLASS, Phase, Sequence


class Silent:
    stopped = False

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _sequence(name: str, tokens: int, *, rank: int = 1, arrival: int = 0, index: int = 0, start: int = 0) -> Sequence:
    return Sequence(
        job_id=name,
        attempt=1,
        index=index,
        prompt_ids=tuple(range(start, start + tokens)),
        params=SamplingParams(),
        text=Silent(),
        token_limit=1000,
        stop_ids=frozenset(),
        priority_rank=rank,
        arrival=arrival,
    )


def _scheduler(rows: int = 4, slot_tokens: int = 1 << 20, stall_s: float = 0.1) -> BatchScheduler:
    return BatchScheduler(BatchLimits(rows, slot_tokens, stall_s))


def _start(scheduler: BatchScheduler, *sequences: Sequence) -> None:
    """Bring sequences to running."""
    for sequence in sequences:
        scheduler.add(sequence)
    for sequence in scheduler.admit():
        sequence.prefilled = sequence.prefill_target
        scheduler.promote(sequence)


def _observe(scheduler: BatchScheduler, tokens: int, seconds: float, start: int = 0) -> None:
    scheduler.observe_prefill([Chunk(_sequence("seen", 1), start, tokens)], seconds)


def _finish(decision: Prefill) -> None:
    for chunk in decision.chunks:
        chunk.sequence.prefilled += chunk.count


def test_admission_is_in_order_of_class_and_arrival_up_to_the_rows() -> None:
    scheduler = _scheduler(rows=2)
    low, first, second = (
        _sequence(name, 5, rank=rank, arrival=at) for name, rank, at in (("l", 2, 0), ("a", 1, 1), ("b", 1, 2))
    )
    for sequence in (low, first, second):
        scheduler.add(sequence)
    assert scheduler.admit() == [first, second]
    assert (scheduler.busy_rows, scheduler.free_rows, scheduler.waiting) == (2, 0, [low])


def test_what_does_not_fit_the_budget_waits_and_holds_back_the_rest() -> None:
    scheduler = _scheduler(slot_tokens=256)
    small, large, tiny = _sequence("s", 60), _sequence("l", 200, arrival=1), _sequence("t", 5, arrival=2)
    for sequence in (small, large, tiny):
        scheduler.add(sequence)
    assert scheduler.admit() == [small]
    scheduler.remove(small)
    assert scheduler.admit() == [large]


def test_a_sequence_larger_than_the_budget_runs_alone() -> None:
    scheduler = _scheduler(slot_tokens=64)
    scheduler.add(huge := _sequence("h", 500))
    assert scheduler.admit() == [huge]


def test_choices_of_a_job_prefill_one_after_the_other() -> None:
    scheduler = _scheduler()
    choices = [_sequence("job", 50, index=index) for index in range(3)]
    for choice in choices:
        scheduler.add(choice)
    assert scheduler.admit() == choices[:1]
    scheduler.promote(choices[0])
    assert scheduler.admit() == choices[1:2]


def test_a_long_common_beginning_is_waited_for_unless_the_other_is_of_a_lower_class() -> None:
    scheduler = _scheduler(rows=8)
    first, same, high, short = (
        _sequence(name, tokens, rank=rank, arrival=at)
        for at, (name, tokens, rank) in enumerate([("a", 500, 1), ("b", 300, 1), ("c", 300, 0), ("d", 100, 1)])
    )
    scheduler.add(first)
    scheduler.admit()
    for sequence in (same, high, short):
        scheduler.add(sequence)
    assert scheduler.admit() == [high, short]
    scheduler.remove(high)
    scheduler.promote(first)
    assert scheduler.admit() == [same]


def test_a_beginning_that_was_cached_already_is_not_waited_for() -> None:
    scheduler = _scheduler()
    first, second = _sequence("a", 300), _sequence("b", 300, arrival=1)
    scheduler.add(first)
    scheduler.admit()
    first.cached_tokens = 256
    scheduler.add(second)
    assert scheduler.admit() == [second]


def test_prefill_and_decode_take_turns_while_streams_run() -> None:
    scheduler = _scheduler()
    _start(scheduler, _sequence("stream", 5))
    scheduler.add(_sequence("long", 500, arrival=1))
    scheduler.admit()
    kinds: list[type] = []
    for _ in range(6):
        decision = scheduler.schedule()
        kinds.append(type(decision))
        if isinstance(decision, Prefill):
            _finish(decision)
    assert kinds == [Prefill, Decode] * 3


def test_nothing_to_do_is_idle() -> None:
    assert _scheduler().schedule() == Idle()


def _budget(scheduler: BatchScheduler) -> int:
    scheduler.add(long := _sequence("long", 100_000, arrival=9))
    scheduler.admit()
    decision = scheduler.schedule()
    assert isinstance(decision, Prefill)
    scheduler.remove(long)
    return sum(chunk.count for chunk in decision.chunks)


def test_the_chunk_is_what_the_measured_speed_does_in_the_stall_time() -> None:
    scheduler = _scheduler(stall_s=0.1)
    _start(scheduler, _sequence("stream", 5))
    _observe(scheduler, tokens=400, seconds=0.1)
    assert _budget(scheduler) == 400


def test_a_chunk_that_took_too_long_shortens_the_next() -> None:
    scheduler = _scheduler(stall_s=0.1)
    _start(scheduler, _sequence("stream", 5))
    _observe(scheduler, tokens=600, seconds=0.15)
    assert _budget(scheduler) == 200


def test_short_prompts_do_not_make_long_ones_look_slow() -> None:
    scheduler = _scheduler(stall_s=0.1)
    _start(scheduler, _sequence("stream", 5))
    _observe(scheduler, tokens=400, seconds=0.1)
    for _ in range(10):
        _observe(scheduler, tokens=5, seconds=0.01)
    assert _budget(scheduler) == 400


def test_the_chunk_has_bounds() -> None:
    assert _budget(_scheduler()) == MIN_IDLE_CHUNK_TOKENS
    slow = _scheduler()
    _start(slow, _sequence("stream", 5))
    assert _budget(slow) == MIN_CHUNK_TOKENS
    fast = _scheduler()
    _observe(fast, tokens=1_000_000, seconds=0.1)
    assert _budget(fast) == MAX_CHUNK_TOKENS


def test_tokens_far_behind_are_reckoned_with_what_they_attend_to() -> None:
    scheduler = _scheduler(stall_s=0.1)
    for start, tokens in ((0, 100), (0, 400), (400, 400), (0, 100), (800, 200)):
        _observe(scheduler, tokens, seconds=tokens * 1e-4 + tokens * (start + tokens / 2) * 1e-6, start=start)
    _start(scheduler, _sequence("stream", 5))
    scheduler.add(long := _sequence("long", 100_000, arrival=9))
    scheduler.admit()
    for start in (0, 1000, 4000):
        long.prefilled = start
        decision = scheduler.schedule()
        assert isinstance(decision, Prefill)
        (chunk,) = decision.chunks
        assert abs(chunk.count * 1e-4 + chunk.count * (start + chunk.count / 2) * 1e-6 - 0.1) < 0.01
        assert isinstance(scheduler.schedule(), Decode)


def test_launches_grow_by_doubling() -> None:
    scheduler = _scheduler(stall_s=0.1)
    _start(scheduler, _sequence("stream", 5))
    sizes: list[int] = []
    for _ in range(5):
        scheduler.schedule()
        sizes.append(_budget(scheduler))
        _observe(scheduler, sizes[-1], seconds=sizes[-1] / 1e6)
    assert sizes == [16, 128, 256, 512, 1024]


def test_a_slow_machine_takes_chunks_that_end_long_before_the_watchdog_does() -> None:
    for tokens_per_s, expected in ((0.5, MIN_CHUNK_TOKENS), (10.0, 50), (100.0, MIN_IDLE_CHUNK_TOKENS)):
        scheduler = _scheduler()
        _observe(scheduler, tokens=64, seconds=64 / tokens_per_s)
        assert _budget(scheduler) == expected


def test_the_first_in_order_gets_half_and_the_shortest_the_rest() -> None:
    scheduler = _scheduler(stall_s=0.1)
    _start(scheduler, _sequence("stream", 5))
    _observe(scheduler, tokens=100, seconds=0.1)
    for name, tokens, arrival in (("first", 900, 1), ("long", 800, 2), ("short", 21, 3)):
        scheduler.add(_sequence(name, tokens, arrival=arrival, start=arrival))
    scheduler.admit()
    decision = scheduler.schedule()
    assert isinstance(decision, Prefill)
    assert {chunk.sequence.job_id: chunk.count for chunk in decision.chunks} == {"first": 50, "short": 20, "long": 30}


def test_the_victim_is_the_last_in_service_order_and_never_the_only_row() -> None:
    scheduler = _scheduler(slot_tokens=128)
    first, second = _sequence("a", 40), _sequence("b", 40, arrival=1)
    _start(scheduler, first, second)
    assert scheduler.victim() is None
    first.emitted.extend(range(60))
    assert scheduler.victim() is second
    scheduler.send_back(second)
    assert (second.phase, second.prefilled, scheduler.victim()) == (Phase.WAITING, 0, None)


def test_a_chunk_between_steps_of_batch_work_may_take_longer() -> None:
    scheduler = BatchScheduler(BatchLimits(4, 1 << 20, 0.1, batch_stall_s=0.5))
    _observe(scheduler, tokens=1000, seconds=1.0)
    _start(scheduler, _sequence("batch", 5, rank=3))
    assert (scheduler.stall_s, _budget(scheduler)) == (0.5, 500)
    _start(scheduler, _sequence("stream", 5, arrival=1))
    scheduler.schedule()
    assert (scheduler.stall_s, _budget(scheduler)) == (0.1, 100)


def test_a_chunk_that_held_up_nobody_leaves_no_debt() -> None:
    scheduler = _scheduler(stall_s=0.1)
    _observe(scheduler, tokens=400, seconds=0.4)
    _start(scheduler, _sequence("stream", 5))
    assert _budget(scheduler) == 100


def test_what_resumes_goes_before_what_is_new_in_its_class() -> None:
    scheduler = _scheduler(rows=1)
    high, new, resumed = _sequence("h", 5, rank=0, arrival=3), _sequence("n", 5), _sequence("r", 5, arrival=2)
    resumed.emitted.append(1)
    for sequence in (new, resumed, high):
        scheduler.add(sequence)
    assert scheduler.waiting == [high, resumed, new]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_low_row_gets_in_however_much_higher_work_keeps_coming(rank: int) -> None:
    scheduler = _scheduler(rows=1)
    scheduler.add(low := _sequence("low", 5, rank=rank))
    ahead: list[str] = []
    while low.phase is Phase.WAITING and len(ahead) < 1000:
        scheduler.add(_sequence(f"high-{len(ahead)}", 5, rank=0, arrival=1 + len(ahead), start=len(ahead) * 10))
        (admitted,) = scheduler.admit()
        ahead.append(admitted.job_id)
        scheduler.remove(admitted)
    assert ahead[-1] == "low" and len(ahead) == OVERTAKINGS_PER_CLASS * rank + 1


def test_a_row_that_is_preempted_again_and_again_is_one_day_no_victim() -> None:
    scheduler = _scheduler(rows=1)
    scheduler.add(low := _sequence("low", 5, rank=1))
    preempted = 0
    for turn in range(10 * OVERTAKINGS_PER_CLASS):
        if not scheduler.running:
            _start(scheduler)
        scheduler.add(high := _sequence(f"high-{turn}", 5, rank=0, arrival=1 + turn, start=turn * 10))
        victim = scheduler.victim()
        if victim is None:
            break
        assert victim is low
        preempted += 1
        scheduler.send_back(low)
        _start(scheduler)
        assert scheduler.running == [high]
        scheduler.remove(high)
    assert scheduler.running == [low] and 0 < preempted <= OVERTAKINGS_PER_CLASS


def test_a_higher_row_takes_the_room_of_the_newest_of_the_lowest_class() -> None:
    scheduler = _scheduler(rows=3)
    normal, older, newer = (
        _sequence("n", 5, arrival=9),
        _sequence("b1", 5, rank=3),
        _sequence("b2", 5, rank=3, arrival=1),
    )
    _start(scheduler, older, newer, normal)
    scheduler.add(high := _sequence("high", 5, rank=0, arrival=10))
    assert scheduler.victim() is newer
    scheduler.send_back(newer)
    assert scheduler.victim() is None
    assert scheduler.admit() == [high] and scheduler.waiting == [newer]


def test_nobody_is_preempted_where_that_makes_too_little_room_or_for_the_same_class() -> None:
    scheduler = _scheduler(slot_tokens=512)
    _start(scheduler, _sequence("mine", 200, rank=0), _sequence("batch", 60, rank=3, arrival=1))
    scheduler.add(_sequence("too-long", 300, rank=0, arrival=2))
    assert scheduler.victim() is None
    full = _scheduler(rows=1)
    _start(full, _sequence("a", 5))
    full.add(_sequence("b", 5, arrival=1))
    assert full.victim() is None


def _fail_steps_with(scheduler: BatchScheduler, culprit: Sequence) -> int:
    """Steps until the culprit is found, as the engine goes about it."""
    for step in range(1, 100):
        while (victim := scheduler.victim()) is not None:
            scheduler.send_back(victim)
        _start(scheduler)
        rows = list(scheduler.running)
        if rows == [culprit]:
            return step
        if culprit in rows:
            for sequence in rows:
                scheduler.send_back(sequence)
            scheduler.accuse(rows)
        else:
            for sequence in rows:
                scheduler.acquit(sequence)
    raise AssertionError("never found")


@pytest.mark.parametrize("place", [0, 13, 31])
def test_the_culprit_among_32_is_found_by_halving(place: int) -> None:
    scheduler = _scheduler(rows=32)
    rows = [_sequence(f"job-{at}", 5, arrival=at, start=at * 10) for at in range(32)]
    _start(scheduler, *rows)
    assert _fail_steps_with(scheduler, rows[place]) <= 11
    scheduler.remove(rows[place])
    for _ in range(11):
        for sequence in scheduler.running:
            scheduler.acquit(sequence)
        while (victim := scheduler.victim()) is not None:
            scheduler.send_back(victim)
        _start(scheduler)
    assert not scheduler.on_trial and len(scheduler.running) == 31


def test_nobody_joins_those_on_trial() -> None:
    scheduler = _scheduler()
    first, second, other = (_sequence(name, 5, arrival=at) for at, name in enumerate("abc"))
    for sequence in (first, second):
        scheduler.add(sequence)
    scheduler.accuse([first, second])
    scheduler.add(other)
    _start(scheduler)
    assert (scheduler.running, scheduler.admit()) == ([first], [])
    scheduler.acquit(first)
    assert scheduler.admit() == [] and scheduler.victim() is first
    scheduler.send_back(first)
    _start(scheduler)
    assert scheduler.running == [second]
    scheduler.remove(second)
    _start(scheduler)
    assert scheduler.running == [first, other]


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from([64, 512, 4096]),
)
def test_every_sequence_gets_its_prefill_and_its_row(work: list[tuple[int, int]], rows: int, slot_tokens: int) -> None:
    scheduler = _scheduler(rows=rows, slot_tokens=slot_tokens)
    sequences = [_sequence(f"job-{at}", tokens, rank=rank, arrival=at) for at, (tokens, rank) in enumerate(work)]
    for sequence in sequences:
        scheduler.add(sequence)
    done: list[Sequence] = []
    for _ in range(2000):
        if not scheduler.has_work:
            break
        scheduler.admit()
        for sequence in [s for s in scheduler.prefilling if s.prefilled == s.prefill_target]:
            scheduler.promote(sequence)
        assert scheduler.busy_rows <= rows
        decision = scheduler.schedule()
        if isinstance(decision, Prefill):
            assert all(
                0 < chunk.count <= s.prefill_target - s.prefilled for chunk in decision.chunks for s in [chunk.sequence]
            )
            _finish(decision)
        elif isinstance(decision, Decode):
            done.append(scheduler.running[0])
            scheduler.remove(done[-1])
    assert sorted(sequence.job_id for sequence in done) == sorted(sequence.job_id for sequence in sequences)
    assert scheduler.free_slot_tokens == slot_tokens and scheduler.free_rows == rows


def test_no_room_is_made_for_what_cannot_begin_yet() -> None:
    scheduler = _scheduler(rows=1)
    _start(scheduler, low := _sequence("low", 5, rank=3))
    scheduler.add(high := _sequence("high", 5, rank=0, arrival=1))
    assert scheduler.victim(lambda sequence: sequence is not high) is None
    assert scheduler.victim() is low


@dataclass
class _Plan:
    """A row's answer, and at which token every step that it takes part in fails; -1: never."""

    tokens: int
    breaks_at: int


def _run_plan(scheduler: BatchScheduler, plans: dict[Sequence, _Plan]) -> set[Sequence]:
    """Drive the scheduler as the engine does; returns whom it found guilty. Rows leave as soon as they end."""
    guilty: set[Sequence] = set()
    for _ in range(20_000):
        if not scheduler.has_work:
            return guilty
        for sequence in [s for s in scheduler.running if len(s.emitted) == plans[s].tokens]:
            scheduler.remove(sequence)
        while (victim := scheduler.victim()) is not None:
            scheduler.send_back(victim)
        scheduler.admit()
        for sequence in [s for s in scheduler.prefilling if s.prefilled >= s.prefill_target]:
            scheduler.promote(sequence)
        match scheduler.schedule():
            case Prefill() as prefill:
                _finish(prefill)
            case Decode():
                _decode(scheduler, plans, guilty)
            case Idle():
                assert not scheduler.waiting or scheduler.running or scheduler.prefilling
    raise AssertionError("the work does not come to an end")


def _decode(scheduler: BatchScheduler, plans: dict[Sequence, _Plan], guilty: set[Sequence]) -> None:
    rows = list(scheduler.running)
    if not any(len(sequence.emitted) == plans[sequence].breaks_at for sequence in rows):
        for sequence in rows:
            sequence.emitted.append(1)
            scheduler.acquit(sequence)
        return
    for sequence in [*scheduler.prefilling, *rows]:
        scheduler.send_back(sequence)
    if len(rows) == 1:
        guilty.add(rows[0])
        scheduler.remove(rows[0])
    else:
        scheduler.accuse(rows)


@given(
    st.lists(
        st.tuples(st.integers(1, 200), st.integers(0, 3), st.integers(1, 12), st.integers(-12, 11)),
        min_size=1,
        max_size=10,
    ),
    st.integers(1, 4),
    st.sampled_from([64, 256, 4096]),
)
def test_whoever_breaks_steps_fails_and_nobody_else_and_all_others_end(
    work: list[tuple[int, int, int, int]], rows: int, slot_tokens: int
) -> None:
    scheduler = _scheduler(rows=rows, slot_tokens=slot_tokens)
    plans: dict[Sequence, _Plan] = {}
    for at, (tokens, rank, answer, breaks_at) in enumerate(work):
        sequence = _sequence(f"job-{at}", tokens, rank=rank, arrival=at)
        plans[sequence] = _Plan(answer, breaks_at)
        scheduler.add(sequence)
    guilty = _run_plan(scheduler, plans)
    assert guilty == {s for s, plan in plans.items() if 0 <= plan.breaks_at < plan.tokens}
    assert all(len(s.emitted) == plan.tokens for s, plan in plans.items() if s not in guilty)
    assert not scheduler.on_trial and scheduler.free_rows == rows
