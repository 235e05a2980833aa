"""Reads the query parameters of GET /v1/jobs into what the listing asks for."""

from __future__ import annotations

from collections.abc import Mapping

from api.protocols.native_job import read_priority_name, unix_ms
from api.protocols.parameters import BadParameter, check_text
from scheduler.db.job_listing import JobFilter
from scheduler.job import JobState, shard_of

FILTERS = ("state", "model", "priority", "batch_id", "schedule_id", "created_after", "created_before", "after")
MAX_CHARS = 256
_MS_DIGITS = 11  # of the time in a job's id, hexadecimal


def read_filter(query: Mapping[str, str], shard: str, tenant: str | None) -> JobFilter:
    """Raises BadParameter. `state` may be several, with commas; `after` is the id of the last job seen."""
    for name, text in query.items():
        check_text(name, text, MAX_CHARS)
    first_ms = _created("created_after", query)
    before_ms = _created("created_before", query)
    limits = [f"job-{shard}-{'f' * _MS_DIGITS}g"]  # above all ids
    limits += [] if before_ms is None else [_first_id(shard, before_ms)]
    limits += [] if "after" not in query else [_read_after(query["after"], shard)]
    return JobFilter(
        first_id=_first_id(shard, 0 if first_ms is None else first_ms),
        before_id=min(limits),
        tenant=tenant,
        states=_read_states(query.get("state")),
        model=query.get("model"),
        priority=None if "priority" not in query else read_priority_name(query["priority"]),
        batch_id=query.get("batch_id"),
        schedule_id=query.get("schedule_id"),
    )


def _first_id(shard: str, created_ms: int) -> str:
    """Not above any id made at this time, and above all made before."""
    return f"job-{shard}-{max(0, created_ms):0{_MS_DIGITS}x}"


def _created(name: str, query: Mapping[str, str]) -> int | None:
    if name not in query:
        return None
    text = query[name].replace(" ", "+")  # what becomes of an offset's plus sign that was not escaped
    try:
        moment = float(text)
    except ValueError:
        return unix_ms(name, text)
    return unix_ms(name, moment)


def _read_after(text: str, shard: str) -> str:
    try:
        if shard_of(text) == shard:
            int(text.rpartition("-")[2][:_MS_DIGITS], 16)
            return text
    except ValueError:
        pass
    raise BadParameter("'after' is the id of the last job seen.", param="after", reason="invalid_value")


def _read_states(text: str | None) -> frozenset[JobState] | None:
    if text is None:
        return None
    try:
        return frozenset(JobState(name.strip()) for name in text.split(","))
    except ValueError as error:
        known = ", ".join(state.value for state in JobState)
        raise BadParameter(f"'state' is one or more of: {known}.", param="state", reason="invalid_value") from error
