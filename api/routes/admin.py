"""GET /admin/workers: who computes, where, and how busy."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from api.auth import require_principal
from api.responses import json_response
from api.services import Services
from scheduler.queue.fleet import WorkerView

router = APIRouter(dependencies=[Depends(require_principal)])


@router.get("/admin/workers")
async def list_workers(request: Request) -> Response:
    """All workers that reported in the last seconds."""
    services: Services = request.app.state.services
    now_ms = int(time.time() * 1000)
    workers = await services.fleet.workers()
    return json_response({"object": "list", "data": [_worker_body(worker, now_ms) for worker in workers]})


def _worker_body(worker: WorkerView, now_ms: int) -> dict[str, Any]:
    return {
        "id": worker.id,
        "object": "worker",
        "pid": worker.pid,
        "engine_pid": worker.engine_pid,
        "host": worker.host,
        "kind": worker.kind,
        "models": list(worker.models),
        "busy_rows": worker.busy_rows,
        "max_rows": worker.max_rows,
        "age_s": max(0.0, (now_ms - worker.started_ms) / 1000),
        "seen_s": max(0.0, (now_ms - worker.seen_ms) / 1000),
        "stats": worker.stats,
    }
