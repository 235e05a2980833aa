"""Reads multipart/form-data bodies of one file and a few small fields, the file straight to its draft on disk.

Called by routes/files; memory is bounded by the pieces that arrive, however large the file is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.body import read_chunks
from api.protocols.parameters import BadParameter
from scheduler.db.file_bytes import FileDraft
from scheduler.errors import BodyTooLarge
from scheduler.settings import Settings

FILE_FIELD = "file"
MAX_FIELDS = 32
MAX_FIELD_BYTES = 8192
ENVELOPE_BYTES = 512 * 1024  # boundaries, headers and fields beside the file

Kind = Literal["begin", "header_begin", "header_field", "header_value", "headers_end", "data", "end"]


@dataclass(slots=True)
class UploadForm:
    """What the form said; `filename` None: it had no file."""

    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict[str, str])


async def read_upload(request: Request, draft: FileDraft, settings: Settings) -> UploadForm:
    """The form's fields; its file is in `draft`. Raises BadParameter, BodyTooLarge, StorageFull, ClientGone."""
    reader = _FormReader(draft, settings.max_file_bytes)
    parser = _parser(request, reader)
    async for chunk in read_chunks(request, settings.max_file_bytes + ENVELOPE_BYTES, "SPILLWAY_MAX_FILE_BYTES"):
        try:
            parser.write(chunk)
        except FormParserError as error:
            raise _malformed(str(error)) from error
        await reader.take_in()
    if not reader.complete:
        raise _malformed("it ends in the middle of a part")
    return reader.form


class _FormReader:
    """The parser's callbacks only note what they are told; `take_in` acts on it, as writing has to be awaited."""

    def __init__(self, draft: FileDraft, max_file_bytes: int) -> None:
        self.form = UploadForm()
        self.complete = False
        self._draft = draft
        self._max_file_bytes = max_file_bytes
        self._noted: list[tuple[Kind, bytes]] = []
        self._headers: dict[bytes, bytes] = {}
        self._header = b""
        self._name = ""
        self._value = bytearray()

    def on_part_begin(self) -> None:
        self._noted.append(("begin", b""))

    def on_header_begin(self) -> None:
        self._noted.append(("header_begin", b""))

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._noted.append(("header_field", data[start:end]))

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._noted.append(("header_value", data[start:end]))

    def on_headers_finished(self) -> None:
        self._noted.append(("headers_end", b""))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._noted.append(("data", data[start:end]))

    def on_part_end(self) -> None:
        self._noted.append(("end", b""))

    def on_end(self) -> None:
        self.complete = True

    async def take_in(self) -> None:
        """Act on what was noted since the last call."""
        noted, self._noted = self._noted, []
        for kind, data in noted:
            match kind:
                case "begin":
                    self._headers, self._header, self._name, self._value = {}, b"", "", bytearray()
                case "header_begin":
                    self._header = b""
                case "header_field":
                    self._header += data.lower()
                case "header_value":
                    self._headers[self._header] = self._headers.get(self._header, b"") + data
                case "headers_end":
                    self._begin_part()
                case "data":
                    await self._take_data(data)
                case "end":
                    self._end_part()

    def _begin_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        self._name = _text(options.get(b"name", b""))
        if not self._name:
            raise _malformed("a part has no name")
        if self._name == FILE_FIELD:
            if self.form.filename is not None:
                raise BadParameter("Only one file can be uploaded at a time.", param="file", reason="invalid_value")
            self.form.filename = _text(options.get(b"filename", b""))
        elif len(self.form.fields) >= MAX_FIELDS:
            raise _malformed(f"it has more than {MAX_FIELDS} fields")

    async def _take_data(self, data: bytes) -> None:
        if self._name == FILE_FIELD:
            if self._draft.size + len(data) > self._max_file_bytes:
                raise BodyTooLarge(
                    f"The file is larger than the limit of {self._max_file_bytes} bytes (SPILLWAY_MAX_FILE_BYTES)."
                )
            await self._draft.write(data)
            return
        self._value += data
        if len(self._value) > MAX_FIELD_BYTES:
            raise _malformed(f"the field '{self._name[:64]}' is longer than {MAX_FIELD_BYTES} bytes")

    def _end_part(self) -> None:
        if self._name != FILE_FIELD:
            self.form.fields[self._name] = _text(bytes(self._value))


def _parser(request: Request, reader: _FormReader) -> MultipartParser:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise BadParameter(
            "Send the file as multipart/form-data, with the members 'file' and 'purpose'.", reason="invalid_form"
        )
    try:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": reader.on_part_begin,
                "on_header_begin": reader.on_header_begin,
                "on_header_field": reader.on_header_field,
                "on_header_value": reader.on_header_value,
                "on_headers_finished": reader.on_headers_finished,
                "on_part_data": reader.on_part_data,
                "on_part_end": reader.on_part_end,
                "on_end": reader.on_end,
            },
        )
    except FormParserError as error:
        raise _malformed(str(error)) from error


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def _malformed(why: str) -> BadParameter:
    return BadParameter(f"The multipart body cannot be read: {why}.", reason="invalid_form")
