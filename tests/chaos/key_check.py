"""I5 when nothing runs any more: no key without TTL but the singletons, and none that says a job is still waiting."""

from __future__ import annotations

from tests.chaos.evidence import Archive, Evidence
from tests.chaos.ledger import Ledger

_OF_THE_LIVING = ("q:", "act:", "cx:", "hold:")  # queues, backlogged tenants, cancels, a worker emptying itself
_EMPTY = ("due", "deadlines", "depth", "live")


async def check_keys(archive: Archive, evidence: Evidence, ledger: Ledger) -> None:
    """Blames each key that should have gone with its job or its worker."""
    bodies = {job_id for job_id in evidence.dead} | {
        job_id for job_id, row in evidence.durable.items() if row.state != "succeeded"
    }
    async for raw in archive.redis.scan_iter(count=1000):
        key = raw.decode()
        part = key.removeprefix(archive.keys.prefix)
        forever = await archive.redis.pttl(raw) == -1 and not archive.keys.is_singleton(key)
        body = part.startswith("b:") and part[2:] not in bodies
        held = part.startswith("own:") and await archive.redis.hlen(raw) > 0
        if forever or body or held or part.startswith(_OF_THE_LIVING):
            why = "no TTL" if forever else "no owner"
            ledger.blame(f"key {key} has {why}: {await archive.describe(raw)}", ledger.by_job().get(part[2:]))
    for name in _EMPTY:
        key = archive.keys.of(name)
        if await archive.redis.exists(key):
            ledger.blame(f"{key} is not empty: {await archive.describe(key.encode())}")
    await _check_leases(archive, ledger)


async def _check_leases(archive: Archive, ledger: Ledger) -> None:
    alive = {process.pid for process in archive.stage.keeper.processes if process.alive}
    for worker in await archive.redis.zrange(archive.keys.of("lease"), 0, -1):
        if int(worker.decode().split("-")[-2]) not in alive:
            ledger.blame(f"a dead worker has a lease: {worker.decode()}")
