"""Wire forms of the queue: job hash → JobView, claim reply → ClaimedJob, and what a worker says at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from scheduler.job import AttemptView, ClaimedJob, JobState, JobView, NewJob, Priority
from scheduler.queue.keys import quoted, unquoted
from scheduler.request import Usage


@dataclass(frozen=True, slots=True)
class Enqueued:
    """`created` False: an earlier job with the same Idempotency-Key and body answers, and `job_id` is its id."""

    job_id: str
    created: bool


@dataclass(frozen=True, slots=True)
class EmitResult:
    """`fenced`: no longer this worker's, stop computing them; `cancelled`: stop, then finish them as cancelled.

    `lease_lost`: the worker was given up (all its jobs are fenced); its next claim starts a new lease.
    """

    fenced: frozenset[str]
    cancelled: frozenset[str]
    lease_lost: bool


NO_USAGE = Usage()
EMITTED = EmitResult(frozenset(), frozenset(), False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended. With `retry_delay_ms` the job goes on (then `payload` is not used), else it is sealed.

    `payload`: the encoded terminal event. `dead`: attempts ran out, keep it as a dead letter. For state CANCELLED the
    queue decides whether it was a cancel or the deadline, and writes the event itself.
    """

    state: JobState
    payload: bytes = b""
    usage: Usage = NO_USAGE
    retry_delay_ms: int | None = None
    error_code: str = ""
    error_message: str = ""
    dead: bool = False


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What one sweep did; `ran` False: another process swept just before."""

    ran: bool
    graced: int = 0
    workers: int = 0
    queued: int = 0
    dead: int = 0
    promoted: int = 0
    expired: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class QueueView:
    """One class of one pool. `waiting` counts queued and scheduled jobs, `scheduled` those that are not due yet.

    `urgent`, `resume` and `solo` are lanes of the whole pool, the same in each of its classes: jobs with a deadline
    (they wait in their class too), reclaimed work, work that must run alone. `parked`: preempted jobs of this class.
    `oldest_ms`: how long the first one waits for its turn, of the 256 tenants that are served next.
    """

    pool: str
    priority: Priority
    waiting: int
    scheduled: int
    running: int
    oldest_ms: int | None
    paused: bool
    draining: bool
    claims_per_s: float
    urgent: int
    resume: int
    solo: int
    parked: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A job that ran out of attempts. `entry_id` is the cursor of the listing; `replayable`: its body is kept."""

    entry_id: str
    job_id: str
    pool: str
    priority: Priority
    tenant: str
    attempt: int
    code: str
    message: str
    at_ms: int
    replayable: bool


def queue_view(row: Sequence[bytes | int]) -> QueueView:
    """One row of the queues script's reply."""
    pool, class_, waiting, scheduled, running, oldest, paused, draining, claims, *lanes = row
    urgent, resume, solo, parked = (int(size) for size in lanes)
    return QueueView(
        pool=unquoted(_text(pool)),
        priority=Priority(_text(class_)),
        waiting=int(waiting),
        scheduled=int(scheduled),
        running=int(running),
        oldest_ms=None if int(oldest) < 0 else int(oldest),
        paused=bool(paused),
        draining=bool(draining),
        claims_per_s=float(claims),
        urgent=urgent,
        resume=resume,
        solo=solo,
        parked=parked,
    )


def dead_letter(entry_id: bytes, fields: Mapping[bytes, bytes], replayable: bool) -> DeadLetter:
    """One entry of the `dead` stream."""
    return DeadLetter(
        entry_id=entry_id.decode(),
        job_id=fields[b"id"].decode(),
        pool=unquoted(fields[b"pool"].decode()),
        priority=Priority(fields[b"class"].decode()),
        tenant=unquoted(fields[b"tenant"].decode()),
        attempt=int(fields[b"attempt"]),
        code=fields[b"code"].decode(),
        message=fields[b"message"].decode(),
        at_ms=int(entry_id.partition(b"-")[0]),
        replayable=replayable,
    )


def claimed_job(row: Sequence[bytes | int]) -> ClaimedJob:
    """One row of the claim script's reply."""
    job_id, attempt, body, class_, tenant, rows, lost, deadline, fails = row
    return ClaimedJob(
        id=_text(job_id),
        attempt=int(attempt),
        body=body if isinstance(body, bytes) else b"",
        priority=Priority(_text(class_)),
        tenant=unquoted(_text(tenant)),
        rows=int(rows),
        lost=int(lost),
        deadline_ms=int(deadline) or None,
        failures=int(fails),
    )


def packed_spec(job: NewJob, queue_ttl_ms: int) -> bytes:
    """What was asked, one field of the job hash, as it never changes; read by `_view` and by ready.lua."""
    kv, durable, batch = job.kv_tokens or job.cost_tokens, int(job.durable), job.batch_id or "-"
    names = f"{quoted(job.pool)} {quoted(job.tenant)}"
    return f"{names} {job.cost_tokens} {kv} {job.rows} {queue_ttl_ms} {durable} {batch} {job.model}".encode()


def job_view(job_id: str, fields: Mapping[bytes, bytes]) -> JobView:
    """The job hash."""
    return _view(job_id, {name.decode(): value.decode() for name, value in fields.items()})


def ended_job(fields: Mapping[bytes, bytes]) -> JobView:
    """An entry of the `done` stream: the job hash as it was before the end, and what that changed (False: removed)."""
    if b"job" not in fields:
        return job_view(fields[b"id"].decode(), fields)  # an older version wrote it field by field
    packed = _unpack(fields[b"job"])
    if not isinstance(packed, tuple):  # or all in one
        return _view(fields[b"id"].decode(), packed)
    flat, changed = packed
    told: dict[str, str | int] = dict(zip(flat[::2], flat[1::2], strict=True))
    for name, value in changed.items():
        if value is False:
            told.pop(name, None)
        else:
            told[name] = value
    return _view(fields[b"id"].decode(), told)


_Packed = tuple[list[str], dict[str, str | int | bool]] | dict[str, str | int]
_unpack: Callable[[bytes], _Packed] = msgspec.msgpack.Decoder(_Packed).decode


def _view(job_id: str, fields: Mapping[str, str | int]) -> JobView:
    pool, tenant, durable, batch, model = _asked(fields)
    return JobView(
        id=job_id,
        state=JobState(fields["state"]),
        pool=unquoted(pool),
        model=model,
        priority=Priority(fields["class"]),
        tenant=unquoted(tenant),
        attempt=int(fields.get("attempt", 0)),
        created_ms=int(fields["created"]),
        started_ms=_optional(fields, "started"),
        first_token_ms=_optional(fields, "first"),
        finished_ms=_optional(fields, "finished"),
        deadline_ms=_optional(fields, "deadline"),
        error_code=_optional_text(fields, "code"),
        error_message=_optional_text(fields, "message"),
        usage=_usage(fields),
        attempts=_attempts(fields),
        durable=durable == "1",
        batch_id=None if batch == "-" else batch,
    )


def _asked(fields: Mapping[str, str | int]) -> tuple[str, str, str, str, str]:
    """Pool, tenant, whether it is durable (`1`), batch (or `-`) and model; an older version wrote them one by one."""
    if "spec" in fields:
        pool, tenant, _, _, _, _, durable, batch, model = str(fields["spec"]).split(" ", 8)
    else:
        pool, tenant, model = str(fields["pool"]), str(fields["tenant"]), str(fields.get("model", ""))
        durable, batch = str(fields.get("durable", "0")), str(fields.get("batch", "")) or "-"
    return pool, tenant, durable, batch, model


def _usage(fields: Mapping[str, str | int]) -> Usage | None:
    if "prompt" not in fields:
        return None
    return Usage(
        prompt_tokens=int(fields["prompt"]),
        completion_tokens=int(fields["completion"]),
        cached_tokens=int(fields["cached"]),
    )


def _attempts(fields: Mapping[str, str | int]) -> tuple[AttemptView, ...]:
    found: list[AttemptView] = []
    for name, value in fields.items():
        if name.startswith("a:"):
            started, _, worker = str(value).partition(" ")
            found.append(AttemptView(attempt=int(name[2:]), worker=worker, started_ms=int(started)))
    return tuple(sorted(found, key=lambda view: view.attempt))


def _optional(fields: Mapping[str, str | int], name: str) -> int | None:
    value = fields.get(name)
    return int(value) or None if value is not None else None


def _optional_text(fields: Mapping[str, str | int], name: str) -> str | None:
    value = fields.get(name)
    return str(value) if value else None


def _text(value: bytes | int) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
