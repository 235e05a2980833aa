"""Many jobs at once, as a listing shows them: hashes by id, and the ends that SQL does not have yet."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.job import JobView
from scheduler.queue.reader import QueueReader
from scheduler.queue.records import job_view


class JobViews(QueueReader):
    """All calls raise QueueUnavailable when Redis cannot be reached."""

    async def views(self, job_ids: Sequence[str]) -> dict[str, JobView]:
        """Those of these jobs that Redis has, in one round trip."""
        if not job_ids:
            return {}
        rows = await self._each("HGETALL", [self.keys.job(job_id) for job_id in job_ids])
        return {job_id: job_view(job_id, fields) for job_id, fields in zip(job_ids, rows, strict=True) if fields}

    async def unrecorded(self, limit: int) -> list[str]:
        """Ids of up to `limit` jobs whose end is on its way to SQL, the latest ends first."""
        rows = await self._command("XREVRANGE", self.keys.of("done"), "+", "-", "COUNT", limit)
        return [fields[b"id"].decode() for _, fields in rows]

    async def has_body(self, job_id: str) -> bool:
        """Whether what a replay needs is still kept."""
        return bool(await self._command("EXISTS", self.keys.of("body", job_id)))
