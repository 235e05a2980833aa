"""Changes the class of a durable job in SQL: of a held one that is all, of a sent one Redis has to be told as well."""

from __future__ import annotations

from sqlmodel import col, update

from scheduler.db.durable_rows import Stage
from scheduler.db.models import DurableJob
from scheduler.db.session import Database
from scheduler.job import Priority


async def set_priority(database: Database, job_id: str, priority: Priority) -> Stage | None:
    """The job has this class from now on, also when it is brought to Redis again; None: it is over, or unknown."""
    change = (
        update(DurableJob)
        .where(col(DurableJob.id) == job_id, col(DurableJob.stage) != Stage.DONE.value)
        .values(priority=priority.value)
        .returning(col(DurableJob.stage))
        .execution_options(synchronize_session=False)
    )
    async with database.session() as session:
        stage = (await session.exec(change)).scalar_one_or_none()
        await session.commit()
    return None if stage is None else Stage(stage)
