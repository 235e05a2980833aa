"""The input file of a batch: a JSON object on each line, `{"custom_id", "method", "url", "body"}`.

Called by expansion.py, in its threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from scheduler.batch import LineError
from scheduler.dialect import Dialect
from scheduler.errors import InvalidRequest, SpillwayError
from scheduler.request import InferenceRequest

MAX_CUSTOM_ID_CHARS = 512
ENVELOPE_BYTES = 4096  # of a line around its body
BOM = b"\xef\xbb\xbf"


class WireLine(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


@dataclass(frozen=True, slots=True)
class RawLine:
    """`data` None: the line is longer than the limit."""

    number: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class InputLine:
    number: int
    custom_id: str
    request: InferenceRequest


def read_lines(path: Path, max_line_bytes: int, after: int = 0) -> Iterator[RawLine]:
    """The lines behind the one numbered `after` (from 1) that hold anything; memory is bounded by `max_line_bytes`."""
    with path.open("rb") as file:
        number = 0
        while data := file.readline(max_line_bytes + 1):
            number += 1
            too_long = len(data) > max_line_bytes and not data.endswith(b"\n")
            while too_long and data and not data.endswith(b"\n"):
                data = file.readline(max_line_bytes)
            if number <= after:
                continue
            data = data.removeprefix(BOM).strip() if number == 1 else data.strip()
            if too_long:
                yield RawLine(number, None)
            elif data:
                yield RawLine(number, data)


def parse_line(raw: RawLine, endpoint: str, dialect: Dialect, fallback_seed: int) -> InputLine | LineError:
    """The line's request, or why it cannot be run."""
    number = raw.number
    if raw.data is None:
        return LineError("line_too_long", "This line is longer than a request may be.", number)
    try:
        wire = msgspec.json.decode(raw.data, type=WireLine)
    except msgspec.ValidationError as error:
        return _bad_member(str(error), number)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return LineError("invalid_json_line", "This line is not parseable as valid JSON.", number)
    if wrong := _wrong_envelope(wire, endpoint, number):
        return wrong
    try:
        call = dialect.parse(endpoint, bytes(wire.body), fallback_seed)
        if call.stream:
            raise InvalidRequest("Lines of a batch cannot be streamed; leave 'stream' out.", param="stream")
    except SpillwayError as error:
        param = "body" if error.param is None else f"body.{error.param}"
        code = getattr(error, "reason", None) or error.code
        return LineError(code, error.message, number, param)
    return InputLine(number, wire.custom_id, call.request)


def custom_id_digest(custom_id: str) -> bytes:
    """What is remembered of a custom_id to find doubles: 50,000 long ones would take 100 MB."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


def _wrong_envelope(wire: WireLine, endpoint: str, number: int) -> LineError | None:
    if not 1 <= len(wire.custom_id) <= MAX_CUSTOM_ID_CHARS or "\0" in wire.custom_id:
        message = f"The custom_id has 1 to {MAX_CUSTOM_ID_CHARS} characters, without NUL."
        return LineError("invalid_custom_id", message, number, "custom_id")
    if wire.method != "POST":
        return LineError("invalid_method", "The method of every line is POST.", number, "method")
    if wire.url != endpoint:
        message = f"The URL '{wire.url[:80]}' does not match the endpoint of the batch, '{endpoint}'."
        return LineError("invalid_url", message, number, "url")
    return None


def _bad_member(validation: str, number: int) -> LineError:
    for name in WireLine.__struct_fields__:
        if validation == f"Object missing required field `{name}`":
            return LineError("missing_required_parameter", f"This line has no '{name}'.", number, name)
        if validation.endswith(f"at `$.{name}`"):
            what = validation.partition(" - ")[0]
            return LineError("invalid_type", f"Invalid type for '{name}': {what}.", number, name)
    return LineError("invalid_json_line", "This line is not a JSON object.", number)
