"""Small response types that several routes share."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Response

from api.errors import Problem, openai_body


def json_response(body: Any, status: int = 200) -> Response:
    """Any msgspec-encodable value as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def problem_response(problem: Problem) -> Response:
    """An error that came before the response began."""
    return Response(openai_body(problem), problem.status, headers=problem.headers, media_type="application/json")
