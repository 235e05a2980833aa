"""Reads JSON request bodies into typed structs and says precisely what is wrong with one.

Used by every wire protocol; what it raises, `BadParameter`, carries the dotted path and the wire protocol's own code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar, cast

import msgspec

from scheduler.errors import InvalidRequest

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1
MAX_DEPTH = 64

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_PATH = re.compile(r"^(?P<what>.*?) - at `(?:key in )?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_EXPECTED = re.compile(r"Expected `(?P<expected>[^`]*)`, got `(?P<got>[^`]*)`")
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])

_JSON_NAMES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "null": "null",
    "array": "an array",
    "object": "an object",
}


class BadParameter(InvalidRequest):
    """A parameter that cannot be accepted; `reason` is the wire code that says why, e.g. `invalid_type`."""

    def __init__(self, message: str, *, param: str | None = None, reason: str | None = None) -> None:
        super().__init__(message, param=param)
        self.reason = reason


def decode_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """The members of the JSON object in `body`, undecoded; raises BadParameter where it is not one JSON object."""
    body = without_bom(body)
    try:
        if not body.isascii():
            body.decode("utf-8")  # members that nobody reads must be text as well
        return _fields_decoder.decode(body)
    except UnicodeDecodeError as error:
        raise BadParameter(f"The body is not valid UTF-8 (byte {error.start}).", reason="invalid_json") from error
    except RecursionError as error:
        raise BadParameter("The body is nested too deeply.", reason="invalid_json") from error
    except msgspec.ValidationError as error:
        raise BadParameter("The body must be a JSON object.", reason="invalid_json") from error
    except msgspec.DecodeError as error:
        raise BadParameter(f"The body is not valid JSON: {_lower(str(error))}.", reason="invalid_json") from error


def decode_struct(body: bytes, kind: type[_Struct]) -> _Struct:
    """The body as `kind`, after `decode_fields` accepted it; raises BadParameter naming the first bad member."""
    try:
        return msgspec.json.decode(without_bom(body), type=kind)
    except RecursionError as error:
        raise BadParameter("The body is nested too deeply.", reason="invalid_json") from error
    except msgspec.ValidationError as error:
        raise explain(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadParameter(f"The body is not valid JSON: {_lower(str(error))}.", reason="invalid_json") from error


def without_bom(body: bytes) -> bytes:
    return body.removeprefix(b"\xef\xbb\xbf")


def explain(validation: str) -> BadParameter:
    """msgspec's validation message as the error a client reads."""
    located = _PATH.match(validation)
    what, param = (located["what"], _dotted(located["path"])) if located else (validation, None)
    if missing := _MISSING.match(what):
        name = f"{param}.{missing['name']}" if param else missing["name"]
        return BadParameter(f"Missing required parameter: '{name}'.", param=name, reason="missing_required_parameter")
    subject = f"'{param}'" if param else "the body"
    if wrong := _EXPECTED.match(what):
        expected = " or ".join(_JSON_NAMES.get(part, part) for part in wrong["expected"].split(" | "))
        got = _JSON_NAMES.get(wrong["got"], wrong["got"])
        message = f"Invalid type for {subject}: expected {expected}, but got {got} instead."
        return BadParameter(message, param=param, reason="invalid_type")
    return BadParameter(f"Invalid value for {subject}: {_lower(what)}.", param=param, reason="invalid_value")


def check_range(param: str, value: float | None, low: float, high: float) -> None:
    """Raise BadParameter where `value` lies outside [low, high]; None passes."""
    if value is None or low <= value <= high:
        return
    kind = "integer" if isinstance(value, int) else "decimal"
    if value < low:
        said, limit, reason = "below minimum value", f">= {low}", f"{kind}_below_min_value"
    else:
        said, limit, reason = "above maximum value", f"<= {high}", f"{kind}_above_max_value"
    shown = str(value) if len(str(value)) <= 40 else f"{str(value)[:40]}…"
    message = f"Invalid '{param}': {kind} {said}. Expected a value {limit}, but got {shown} instead."
    raise BadParameter(message, param=param, reason=reason)


def check_length(param: str, text: str, longest: int) -> None:
    """Raise BadParameter where `text` has more than `longest` characters."""
    if len(text) > longest:
        message = f"Invalid '{param}': string too long. Expected at most {longest} characters, but got {len(text)}."
        raise BadParameter(message, param=param, reason="string_above_max_length")


def check_text(param: str, text: str, longest: int | None = None) -> None:
    """Raise BadParameter where `text` is too long, or holds what text in SQL and in headers cannot: NUL."""
    if longest is not None:
        check_length(param, text, longest)
    if "\0" in text:
        raise BadParameter(f"Invalid '{param}': it holds a NUL character.", param=param, reason="invalid_value")


def check_storable(param: str, value: object) -> None:
    """Raise BadParameter where JSON that is kept as it came is nested too deeply or holds integers over 64 bits."""
    for depth, leaf in _leaves(value):
        if depth > MAX_DEPTH:
            raise BadParameter(f"'{param}' is nested too deeply.", param=param, reason="invalid_value")
        if isinstance(leaf, int) and not -INT64_MAX <= leaf <= INT64_MAX:
            raise BadParameter(f"'{param}' holds an integer over 64 bits.", param=param, reason="invalid_value")


def _leaves(value: object) -> Iterator[tuple[int, object]]:
    """Everything inside `value` with its depth, without recursion."""
    pending: list[tuple[int, object]] = [(0, value)]
    while pending:
        level, item = pending.pop()
        yield level, item
        if isinstance(item, dict):
            pending += [(level + 1, child) for child in cast("dict[str, object]", item).values()]
        elif isinstance(item, list):
            pending += [(level + 1, child) for child in cast("list[object]", item)]


def _dotted(path: str) -> str | None:
    return path.removeprefix("$").removeprefix(".").replace("[...]", "") or None


def _lower(text: str) -> str:
    """A library's message as the end of a sentence of ours."""
    text = text.removeprefix("JSON is malformed: ").rstrip(".")
    return text[:1].lower() + text[1:]
