"""The reckoning, when everything has settled: Redis, SQL and the ledger tell the same story of each job (I1–I5, I9)."""

from __future__ import annotations

import json
from collections import Counter

from tests.chaos.clients import ENDS
from tests.chaos.event_check import EventCheck, feed_log
from tests.chaos.evidence import TERMINAL, Archive, DurableRecord, Evidence, give_lines_their_jobs
from tests.chaos.key_check import check_keys
from tests.chaos.ledger import Entry, Ledger
from tests.chaos.processes import Managed
from tests.chaos.recurring import check_turns

MAX_LOST, MAX_BURNT = 3, 5  # the defaults of max_lost and max_attempts
_REPEATABLE = {"failed", "cancelled", "expired"}  # ends after which the same key gets another job


async def reckon(archive: Archive, ledger: Ledger) -> None:
    """Reads everything once and blames what does not fit."""
    evidence = await archive.read()
    give_lines_their_jobs(ledger, evidence)
    unlucky = _unlucky(evidence, ledger, list(archive.stage.keeper.processes))
    _check_counts(evidence, ledger)
    _check_strangers(evidence, ledger)
    for entry in ledger.entries:
        _check_entry(evidence, ledger, entry, unlucky)
    for job_id, row in evidence.durable.items():
        _check_durable(evidence, ledger, job_id, row)
    check_turns(archive.stage, ledger)
    _check_attempts(evidence, ledger, unlucky)
    await _check_logs(archive, evidence, ledger)
    await check_keys(archive, evidence, ledger)


def _check_counts(evidence: Evidence, ledger: Ledger) -> None:
    """I4: what Redis accepted has ended, and SQL has each end, state by state; what ended held was never in Redis."""
    recorded = Counter(record.state for job_id, record in evidence.records.items() if job_id in evidence.hashes)
    for state in TERMINAL:
        if evidence.counts[state] != recorded[state]:
            ledger.blame(f"Redis counts {evidence.counts[state]} {state} jobs, SQL has {recorded[state]}")
    ended = sum(evidence.counts[state] for state in TERMINAL)
    if not evidence.counts["accepted"] == ended == len(evidence.hashes):
        accepted = evidence.counts["accepted"]
        ledger.blame(f"{accepted} jobs were accepted, {ended} ended, Redis knows {len(evidence.hashes)}")
    for job_id in evidence.records.keys() - evidence.hashes.keys():
        if evidence.records[job_id].state not in ("cancelled", "expired") or job_id not in evidence.durable:
            ledger.blame(f"{job_id} has a record, and Redis never had it", ledger.by_job().get(job_id))


def _check_strangers(evidence: Evidence, ledger: Ledger) -> None:
    """Jobs that no client knows can only be those of clients without a key whose connection broke early."""
    strangers = (evidence.records.keys() | evidence.durable.keys()) - ledger.by_job().keys()
    nameless = [entry for entry in ledger.entries if entry.job_id is None and not entry.keyed]
    if len(strangers) > len(nameless):
        ledger.blame(f"{len(strangers)} jobs that nobody ordered, {len(nameless)} orders without a job id")


def _check_entry(evidence: Evidence, ledger: Ledger, entry: Entry, unlucky: set[str]) -> None:
    """I1: every order ended once, as it may, and its client was told so."""
    if (entry.keyed or entry.order.line) and not entry.answered:
        ledger.blame("its client never got an end", entry)
    for number, job_id in enumerate(entry.job_ids, 1):
        state = _state(evidence, job_id)
        if state is None:
            ledger.blame(f"{job_id} has no terminal record", entry)
        elif state not in entry.order.may_end and not (state == "failed" and job_id in unlucky):
            ledger.blame(f"{job_id} ended {state}", entry)
        if number < len(entry.job_ids) and state not in _REPEATABLE:
            ledger.blame(f"one order, several jobs: {entry.job_ids}", entry)
    if entry.order.line and len(entry.job_ids) != (0 if entry.unborn else 1):
        ledger.blame(f"a line of a batch has the jobs {entry.job_ids}", entry)
    if entry.job_id is not None:
        _check_told(ledger, entry, _state(evidence, entry.job_id))


def _check_told(ledger: Ledger, entry: Entry, state: str | None) -> None:
    if entry.text is not None and state != "succeeded":
        ledger.blame(f"its client has the whole answer, the record says {state}", entry)
    if entry.error_code in ENDS and state != ENDS[entry.error_code]:
        ledger.blame(f"its client was told {entry.error_code}, the record says {state}", entry)


def _state(evidence: Evidence, job_id: str) -> str | None:
    if job_id in evidence.records:
        return evidence.records[job_id].state
    row = evidence.durable.get(job_id)
    return row.state if row is not None and row.batch_id is not None else None  # a line that ended held


def _check_durable(evidence: Evidence, ledger: Ledger, job_id: str, row: DurableRecord) -> None:
    """The outbox agrees with the records, and keeps the exact answer."""
    entry = ledger.by_job().get(job_id)
    record = evidence.records.get(job_id)
    if row.stage != "done" or row.state not in TERMINAL:
        ledger.blame(f"{job_id}: its durable row is {row.stage}, {row.state}", entry)
    if record is not None and (record.state, record.attempt) != (row.state, row.attempt):
        ledger.blame(f"{job_id}: the durable row says {row.state} at attempt {row.attempt}, the record {record}", entry)
    if row.state != "succeeded" or entry is None or entry.order.expected is None:
        return
    answer = None if row.answer is None else json.loads(row.answer)["choices"][0]["message"]["content"]
    if answer != entry.order.expected.text:
        ledger.blame(f"{job_id}: the stored answer {str(answer)[-60:]!r} is not the solo run's", entry)


def _check_attempts(evidence: Evidence, ledger: Ledger, unlucky: set[str]) -> None:
    """I9: nobody was tried more often than allowed; poison jobs are dead letters, once each, and alone."""
    by_job = ledger.by_job()
    for job_id, times in Counter(evidence.dead).items():
        entry = by_job.get(job_id)
        if times > 1:
            ledger.blame(f"{job_id} is {times} times a dead letter", entry)
        if not (entry and entry.order.poison) and job_id not in unlucky:
            ledger.blame(f"{job_id} died with a poison job, or of nothing", entry)
    for job_id, job in evidence.hashes.items():
        lost, fails = int(job.get("lost", 0)), int(job.get("fails", 0))
        if lost > MAX_LOST or lost + fails > MAX_BURNT:
            ledger.blame(f"{job_id} was lost {lost} times and failed {fails} times", by_job.get(job_id))


def _unlucky(evidence: Evidence, ledger: Ledger, processes: list[Managed]) -> set[str]:
    """Dead letters that ran alone when a fault of ours, not a neighbour's poison, hit their last worker."""
    poison = {job_id for entry in ledger.entries if entry.order.poison for job_id in entry.job_ids}
    found = {
        job_id
        for job_id in evidence.dead
        if job_id not in poison and _last_worker_was_hurt(evidence.hashes[job_id], processes)
    }
    for _ in found:
        ledger.count("jobs that met three faults")
    return found


def _last_worker_was_hurt(job: dict[str, str], processes: list[Managed]) -> bool:
    started_ms, _, worker = job[f"a:{job['attempt']}"].partition(" ")
    pid = int(worker.split("-")[-2])
    hurts = [hurt for process in processes for hurt in process.hurts if hurt.pid == pid]
    return any(hurt.until_ms >= int(started_ms) - 10 and hurt.from_ms <= int(job["finished"]) for hurt in hurts)


async def _check_logs(archive: Archive, evidence: Evidence, ledger: Ledger) -> None:
    """I2, I3 on every job's log, also of those that no client watched."""
    by_job = ledger.by_job()
    for job_id, job in evidence.hashes.items():
        entry = by_job.get(job_id)
        check = EventCheck(None if entry is None else entry.order.expected)
        feed_log(check, await archive.log(job_id))
        if check.end is None or (check.end == "finished") != (job["state"] == "succeeded"):
            check.wrong.append(f"the log ends with {check.end}, the job is {job['state']}")
        for text in check.wrong:
            ledger.blame(f"log of {job_id}: {text}", entry)


def tracebacks(processes: list[Managed]) -> list[str]:
    """The processes that logged an exception nobody had foreseen. arq logs its own lost connections so, and goes on."""
    return [
        f"{process.name}: {line[-2000:]}"
        for process in processes
        for line in process.log.read_text(errors="replace").splitlines()
        if "Traceback" in line and "arq/worker.py" not in line
    ][:5]
