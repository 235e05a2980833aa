"""What a job's endpoint would have answered: its body once it succeeded, its error with its own status if it did not.

A durable job's answer is in SQL; until the recorder has put it there, and for an interactive job, it is built from the
event log. Called by /v1/jobs/{id}/result and by requests that prefer an asynchronous answer.
"""

from __future__ import annotations

from fastapi import Response

from api.dialect import CHAT
from api.errors import ResultExpired, problem_of
from api.job_lookup import KnownJob
from api.job_view import job_body, retry_after_s
from api.responses import json_response
from api.services import Services
from scheduler.dialect import Answer
from scheduler.errors import QueueUnavailable, SpillwayError, from_code
from scheduler.job import JobState
from scheduler.request import InferenceRequest, SamplingParams, Usage, decode_request
from scheduler.tokens import SEQ_TERMINAL, ChoiceDelta, EventId, Failed, decode_event


async def result_response(services: Services, job: KnownJob) -> Response:
    """The answer, the error, or 202 where there is neither yet. Raises ResultExpired."""
    if not job.state.is_terminal:
        return accepted_response(job)
    if job.state is JobState.SUCCEEDED:
        return Response(await _answer(services, job), media_type="application/json")
    error = await _error(services, job)
    status, body = services.dialect.render_error(_endpoint(job), error)
    return Response(body, status, headers=problem_of(error).headers, media_type="application/json")


def accepted_response(job: KnownJob, status: int = 202) -> Response:
    """The job as it is, where its result will be, and when to ask."""
    response = json_response(job_body(job), status)
    response.headers["location"] = f"/v1/jobs/{job.id}"
    if status == 202:
        response.headers["retry-after"] = str(retry_after_s(job))
    return response


async def _answer(services: Services, job: KnownJob) -> bytes:
    row = None
    if job.durable is not None:
        row = await services.durable.get(job.id, with_answer=True, with_request=True)
        if row is not None and row.answer is not None:
            return row.answer
    choices = await services.lifecycle.progress(job.id) if job.in_redis else ()
    if not choices:
        if job.is_redis_away:
            raise QueueUnavailable(f"Redis does not answer, which may have the answer of {job.id}; try again.")
        raise ResultExpired(f"The answer of {job.id} is no longer kept; its record is at /v1/jobs/{job.id}.")
    request = _as_asked(job, choices) if row is None or row.request is None else decode_request(row.request)
    usage = Usage() if job.view.usage is None else job.view.usage
    answer = Answer(job.id, job.view.pool, job.view.priority, choices, usage)
    return services.dialect.render(_endpoint(job), request, answer)


def _as_asked(job: KnownJob, choices: tuple[ChoiceDelta, ...]) -> InferenceRequest:
    """What matters for the answer's form, of a request that is not kept."""
    logprobs = any(choice.logprobs for choice in choices)
    sampling = SamplingParams(logprobs=logprobs)
    return InferenceRequest(model=job.view.model, messages=(), n=len(choices), sampling=sampling)


async def _error(services: Services, job: KnownJob) -> SpillwayError:
    view = job.view
    if job.in_redis:
        last = await services.queue.read_events(job.id, EventId(view.attempt, SEQ_TERMINAL - 1), 1)
        event = decode_event(last[0][1]) if last else None
        if isinstance(event, Failed):
            return from_code(event.code, event.message, event.param)
    code = "internal_error" if view.error_code is None else view.error_code
    message = "The job failed." if view.error_message is None else view.error_message
    return from_code(code, message, None if job.durable is None else job.durable.error_param)


def _endpoint(job: KnownJob) -> str:
    return CHAT if job.durable is None else job.durable.endpoint
