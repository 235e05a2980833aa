"""Jobs: ids that name their shard, and transitions that end."""

from __future__ import annotations

import pytest

from scheduler.job import TERMINAL, TRANSITIONS, JobState, new_job_id, shard_of


def test_ids_name_their_shard_and_differ() -> None:
    ids = {new_job_id("p1") for _ in range(1000)}
    assert len(ids) == 1000 and {shard_of(job_id) for job_id in ids} == {"p1"}


def test_ids_sort_by_creation(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    made: list[str] = []
    for now in (1.0, 1_700_000_000.0, 1_800_000_000.001, 9_999_999_999.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        made.append(new_job_id("0"))
    assert made == sorted(made)


@pytest.mark.parametrize(
    "text", ["", "job", "job-0", "job-0-", "job--x", "jab-0-x", "job-0-x-y", "job-{0}-x", "job-0-x:y"]
)
def test_what_is_no_job_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        shard_of(text)


def test_every_state_reaches_an_end_and_no_end_is_left() -> None:
    for state in JobState:
        assert state in TRANSITIONS
        if state in TERMINAL:
            assert state.is_terminal and not TRANSITIONS[state]
    reached = set(TERMINAL)
    while grown := {state for state in JobState if TRANSITIONS[state] & reached} - reached:
        reached |= grown
    assert reached == set(JobState)
