"""The wire protocols as the control plane uses them (see scheduler/dialect.py): jobs are bodies of endpoints."""

from __future__ import annotations

from api.errors import openai_body, problem_of
from api.protocols.openai_chat import TIER_OF_PRIORITY, parse_chat
from api.protocols.openai_chat_answer import CompletionBuilder, CompletionHead
from scheduler.dialect import Answer, ParsedCall
from scheduler.errors import InternalError, InvalidRequest, SpillwayError
from scheduler.job import created_ms_of
from scheduler.request import InferenceRequest
from scheduler.tokens import Delta

CHAT = "/v1/chat/completions"


class HttpDialect:
    """The endpoints of this server that run as jobs."""

    @property
    def endpoints(self) -> frozenset[str]:
        return frozenset({CHAT})

    def parse(self, endpoint: str, body: bytes, fallback_seed: int) -> ParsedCall:
        self._check(endpoint)
        call = parse_chat(body, fallback_seed)
        return ParsedCall(call.request, call.priority, call.stream)

    def render(self, endpoint: str, request: InferenceRequest, answer: Answer) -> bytes:
        self._check(endpoint)
        builder = CompletionBuilder(request.n)
        builder.add(Delta(choices=answer.choices))
        if builder.unfinished:
            raise InternalError(f"The job ended, but its choices {builder.unfinished} did not say why.")
        return builder.build(completion_head(answer), answer.usage, request.sampling.logprobs)

    def render_error(self, endpoint: str, error: SpillwayError) -> tuple[int, bytes]:
        problem = problem_of(error)
        return problem.status, openai_body(problem)

    def _check(self, endpoint: str) -> None:
        if endpoint not in self.endpoints:
            known = ", ".join(sorted(self.endpoints))
            raise InvalidRequest(f"'{endpoint[:64]}' does not run as a job; known: {known}.", param="endpoint")


def completion_head(answer: Answer) -> CompletionHead:
    """What every body of this job says alike."""
    return CompletionHead(
        id=f"chatcmpl-{answer.job_id.removeprefix('job-')}",
        created_s=created_ms_of(answer.job_id) // 1000,
        model=answer.model,
        service_tier=TIER_OF_PRIORITY[answer.priority],
    )
