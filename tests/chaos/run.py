"""One chaos run: stage, solo answers, producers and faults together, then quiet, then the reckoning and a report."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.clients import Desk
from tests.chaos.evidence import Archive
from tests.chaos.faults import Driver, plan
from tests.chaos.ledger import Entry, Ledger
from tests.chaos.orders import demo_requests, heard_alone
from tests.chaos.producers import PRODUCERS, produce
from tests.chaos.reckoning import reckon, tracebacks
from tests.chaos.recurring import recur
from tests.chaos.stage import Stage, open_stage, seeded
from tests.chaos.timeline import Timeline

SETTLE_S = 60.0
_SHOWN_JOBS = 5


@dataclass(frozen=True, slots=True)
class Options:
    """What to run; `home` gets the service's state, all logs and timeline.log."""

    seed: int
    seconds: float
    kinds: Collection[str]
    home: Path
    show: bool = False
    engine: bool = True


async def run(options: Options) -> str:
    """The report of a failed run, or an empty text. The timeline and a summary are in the home."""
    timeline = Timeline(options.home / "timeline.log", show=options.show)
    ledger = Ledger(timeline)
    try:
        timeline.note("run", f"seed {options.seed}, {options.seconds:g} s, Redis AOF everysec")
        async with open_stage(options.home, timeline, engine=options.engine) as stage:
            timeline.note("run", "all processes are ready")
            archive = Archive(stage)
            await _storm(options, stage, ledger)
            await _settle(stage, ledger, archive)
            await reckon(archive, ledger)
            for line in tracebacks(list(stage.keeper.processes)):
                ledger.blame(line)
            timeline.note("counts", _counts(ledger))
            return await _report(options, ledger, archive) if ledger.wrong else ""
    finally:
        timeline.close()


async def _storm(options: Options, stage: Stage, ledger: Ledger) -> None:
    """Producers work through the faults, and stay until their clients have their answers."""
    desk = Desk(stage.ports, ledger)
    requests = demo_requests(seeded(options.seed, "demo")) if options.engine else []
    demo = await heard_alone(desk, requests, random.Random(0))
    stage.timeline.note("run", "faults begin; time starts anew")
    stage.timeline.zero()
    stage.stormy = True
    stop = asyncio.Event()
    producing = [
        asyncio.create_task(produce(desk, name, serve, options.seed, demo, stop)) for name, serve in PRODUCERS.items()
    ]
    producing.append(asyncio.create_task(recur(stage, desk, options.seed, stop)))
    await Driver(stage).run(plan(options.seed, options.seconds, options.kinds))
    await asyncio.sleep(max(0.0, options.seconds - stage.timeline.now_s))
    stop.set()
    stage.keeper.resume()
    stage.timeline.note("run", "faults end")
    await stage.wait_until_ready()
    stage.timeline.note("run", "all processes are ready again")
    done, late = await asyncio.wait(producing, timeout=SETTLE_S)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for task in done:
        task.result()
    stage.timeline.note("run", "producers end")


async def _settle(stage: Stage, ledger: Ledger, archive: Archive) -> None:
    give_up = time.monotonic() + SETTLE_S
    while under_way := await archive.under_way():
        if time.monotonic() > give_up:
            ledger.blame(f"not settled {SETTLE_S:g} s after the last fault: {under_way}")
            return
        await asyncio.sleep(0.1)
    stage.timeline.note("run", "settled")


def _counts(ledger: Ledger) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(ledger.counts.items()))


async def _report(options: Options, ledger: Ledger, archive: Archive) -> str:
    lines = [
        f"chaos failed, seed {options.seed}: {len(ledger.wrong)} findings",
        *ledger.timeline.of("fault", "death", "start", "run"),
    ]
    lines += [text if entry is None else f"{entry.order.name} {entry.job_ids}: {text}" for text, entry in ledger.wrong]
    seen: list[Entry] = []
    for _, entry in ledger.wrong:
        if entry is not None and entry not in seen and len(seen) < _SHOWN_JOBS:
            seen.append(entry)
            lines.append(f"history of {entry.order.name}: {entry.order.body}")
            lines += ["  " + line for line in entry.history]
            for job_id in entry.job_ids:
                lines += [f"  {job_id}", *await archive.history(job_id)]
    return "\n".join(lines)
