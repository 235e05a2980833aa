"""/v1/files: OpenAI's Files API. Uploads go straight to disk; a caller sees the files of its tenant."""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import FileResponse

from api.auth import Principal, require_principal
from api.multipart import UploadForm, read_upload
from api.protocols.openai_batch import WireExpiry, read_expiry
from api.protocols.parameters import BadParameter
from api.responses import json_response
from api.routes.models import read_limit
from api.services import Services
from scheduler.db.files import BATCH_FILE_LIFE_MS, FileRecord, new_file_id
from scheduler.errors import BodyTooLarge, FileNotFound
from scheduler.settings import Settings

MAX_LIMIT = 10_000
MAX_NAME_CHARS = 255
BATCH = "batch"
PURPOSES = ("assistants", BATCH, "evals", "fine-tune", "user_data", "vision")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
Caller = Annotated[Principal, Depends(require_principal)]
router = APIRouter()


@router.post("/v1/files")
async def create_file(request: Request, caller: Caller) -> Response:
    """Store a file. Its purpose `batch` makes it fit for POST /v1/batches."""
    services: Services = request.app.state.services
    async with services.files.drafting() as draft:
        form = await read_upload(request, draft, services.settings)
        record = _record(form, draft.size, caller.tenant, services.settings)
        await services.files.save(draft, record)
    return json_response(file_body(record))


@router.get("/v1/files")
async def list_files(
    request: Request,
    caller: Caller,
    purpose: str | None = None,
    limit: str | None = None,
    order: str = "desc",
    after: str | None = None,
) -> Response:
    """A page of files, newest first unless `order` is asc."""
    services: Services = request.app.state.services
    if order not in ("asc", "desc"):
        raise BadParameter("'order' is asc or desc.", param="order", reason="invalid_value")
    count = read_limit(limit, MAX_LIMIT, MAX_LIMIT)
    tenant = None if caller.key_id is None else caller.tenant
    found = await services.files.list(
        tenant, _now_ms(), purpose=purpose, after=after, limit=count + 1, ascending=order == "asc"
    )
    page = found[:count]
    return json_response(
        {
            "object": "list",
            "data": [file_body(record) for record in page],
            "has_more": len(found) > count,
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
        }
    )


@router.get("/v1/files/{file_id}")
async def get_file(request: Request, caller: Caller, file_id: str) -> Response:
    """One file's description."""
    return json_response(file_body(await find_file(request.app.state.services, caller, file_id)))


@router.get("/v1/files/{file_id}/content")
async def get_content(request: Request, caller: Caller, file_id: str) -> Response:
    """One file's bytes."""
    services: Services = request.app.state.services
    record = await find_file(services, caller, file_id)
    path = services.files.path(record.id)
    if not path.is_file():  # deleted since, or a home that API and scheduler do not share
        raise FileNotFound(f"The content of {record.id} is not on this server.", param="id")
    return FileResponse(path, media_type="application/octet-stream", filename=record.filename)


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request, caller: Caller, file_id: str) -> Response:
    """Remove a file and its bytes. A batch that has read it already goes on."""
    services: Services = request.app.state.services
    record = await find_file(services, caller, file_id)
    await services.files.delete(record.id)
    return json_response({"id": record.id, "object": "file", "deleted": True})


async def find_file(services: Services, caller: Principal, file_id: str) -> FileRecord:
    """The file; one that the caller may not see is one that does not exist. Raises FileNotFound."""
    record = await services.files.get(file_id[:64], _now_ms())
    if record is None or not caller.may_see(record.tenant):
        raise FileNotFound(f"No such File object: {file_id[:64]}", param="id")
    return record


def file_body(record: FileRecord) -> dict[str, Any]:
    """The file object; times are Unix seconds."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_ms // 1000,
        "expires_at": None if record.expires_ms is None else record.expires_ms // 1000,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }


def _record(form: UploadForm, size: int, tenant: str, settings: Settings) -> FileRecord:
    if form.filename is None:
        raise BadParameter("Missing required parameter: 'file'.", param="file", reason="missing_required_parameter")
    purpose = _read_purpose(form.fields)
    if purpose == BATCH and size > settings.max_batch_file_bytes:
        limit = f"{settings.max_batch_file_bytes} bytes (SPILLWAY_MAX_BATCH_FILE_BYTES)"
        raise BodyTooLarge(f"The file has {size} bytes; the limit for batches is {limit}.", param="file")
    now_ms = _now_ms()
    life_ms = _read_life(form.fields, BATCH_FILE_LIFE_MS if purpose == BATCH else None)
    return FileRecord(
        id=new_file_id(now_ms),
        tenant=tenant,
        filename=_clean_name(form.filename),
        purpose=purpose,
        bytes=size,
        created_ms=now_ms,
        expires_ms=None if life_ms is None else now_ms + life_ms,
    )


def _read_purpose(fields: dict[str, str]) -> str:
    purpose = fields.get("purpose")
    if purpose is None:
        message = "Missing required parameter: 'purpose'."
        raise BadParameter(message, param="purpose", reason="missing_required_parameter")
    if purpose not in PURPOSES:
        message = f"'{purpose[:64]}' is not one of {', '.join(map(repr, PURPOSES))}."
        raise BadParameter(f"Invalid 'purpose': {message}", param="purpose", reason="invalid_value")
    return purpose


def _read_life(fields: dict[str, str], default_ms: int | None) -> int | None:
    anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return default_ms
    text = "" if seconds is None else seconds.strip()
    if anchor is None or not (text.isascii() and text.isdigit() and len(text) <= 12):
        message = "'expires_after' has an anchor, 'created_at', and a whole number of seconds."
        raise BadParameter(message, param="expires_after", reason="invalid_value")
    return read_expiry("expires_after", WireExpiry(anchor, int(text))) * 1000


def _clean_name(filename: str) -> str:
    """Without directories and control characters: it comes back in headers and is written to other people's disks."""
    name = _CONTROL.sub("", filename.replace("\\", "/").rpartition("/")[2]).strip()
    return "file" if name in ("", ".", "..") else name[:MAX_NAME_CHARS]


def _now_ms() -> int:
    return int(time.time() * 1000)
