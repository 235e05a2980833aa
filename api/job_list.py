"""One page of jobs out of three places, newest first: live ones from Redis, durable and finished ones from SQL.

Ids sort by the time of their making and a job keeps its id, so a page begins behind an id and stays where it is
whatever comes in meanwhile. The cost is bounded: a rare filter may end a page early, with `has_more` and the place.
"""

from __future__ import annotations

from dataclasses import dataclass

from api.job_lookup import KnownJob, merged
from api.services import Services
from scheduler.db.job_listing import JobFilter
from scheduler.job import JobView

LEAST_STEP = 50  # jobs looked at in one round, from each place
MOST_ROUNDS = 20
MOST_ENDING = 250


@dataclass(frozen=True, slots=True)
class JobPage:
    """`next_id`: the next page begins behind it; None: there is none."""

    jobs: list[KnownJob]
    next_id: str | None


async def read_page(services: Services, wanted: JobFilter, limit: int) -> JobPage:
    """Up to `limit` jobs from `wanted.before_id` downwards."""
    found: list[KnownJob] = []
    ending = await _ending(services, wanted)
    step, cursor = max(limit + 1, LEAST_STEP), wanted.before_id
    for _ in range(MOST_ROUNDS):
        live = await _live(services, wanted, cursor, step)
        stored = await services.job_listing.ids(wanted, cursor, step)
        floor = max((rows[-1] for rows in (list(live), stored) if len(rows) == step), default=wanted.first_id)
        ids = sorted({job_id for job_id in (*live, *stored, *ending) if floor <= job_id < cursor}, reverse=True)
        found += [job for job in await _facts(services, ids, live) if _admits(wanted, job)]
        if len(found) > limit:
            return JobPage(found[:limit], found[limit - 1].id)
        if floor == wanted.first_id:
            return JobPage(found, None)
        cursor = floor
    return JobPage(found, cursor)


async def _live(services: Services, wanted: JobFilter, cursor: str, step: int) -> dict[str, JobView]:
    """Jobs that are not terminal; their number in Redis is bounded by the depth of its queues."""
    if not wanted.wants_live:
        return {}
    state = next(iter(wanted.states)) if wanted.states is not None and len(wanted.states) == 1 else None
    views = await services.queue.list_jobs(
        step, cursor, tenant=wanted.tenant, state=state, priority=wanted.priority, batch_id=wanted.batch_id
    )
    return {view.id: view for view in views}


async def _ending(services: Services, wanted: JobFilter) -> list[str]:
    """Jobs whose end is on its way to SQL: neither live nor recorded."""
    ids = await services.job_views.unrecorded(MOST_ENDING)
    return [job_id for job_id in ids if wanted.first_id <= job_id < wanted.before_id]


async def _facts(services: Services, ids: list[str], live: dict[str, JobView]) -> list[KnownJob]:
    """These jobs as they are now, in the same order."""
    views = live | await services.job_views.views([job_id for job_id in ids if job_id not in live])
    interactive = {job_id for job_id, view in views.items() if not view.durable}
    durable = await services.durable.of_ids([job_id for job_id in ids if job_id not in interactive])
    recorded = await services.jobs.some([job_id for job_id in ids if job_id not in views])
    jobs = (merged(views.get(job_id), durable.get(job_id), recorded.get(job_id)) for job_id in ids)
    return [job for job in jobs if job is not None]


def _admits(wanted: JobFilter, job: KnownJob) -> bool:
    return wanted.admits(job.view, None if job.durable is None else job.durable.schedule_id)
