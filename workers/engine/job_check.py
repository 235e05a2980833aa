"""Refuses a tokenised job that would read outside the model's tables or could never produce a token."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.errors import ContextLengthExceeded, InvalidRequest
from workers.engine.sequence import PreparedJob


def check_job(job: PreparedJob, vocab_size: int, context_tokens: int) -> None:
    """Raises InvalidRequest or ContextLengthExceeded."""
    if not job.prompt_ids:
        raise InvalidRequest("The prompt has no tokens.", param="messages")
    if len(job.prompt_ids) >= context_tokens:
        raise ContextLengthExceeded(
            f"The prompt has {len(job.prompt_ids)} tokens; the model's context is {context_tokens}.", param="messages"
        )
    if not _all_within(job.prompt_ids, vocab_size):
        raise InvalidRequest(f"A prompt token is outside the vocabulary of {vocab_size}.", param="messages")
    if not _all_within(job.request.sampling.logit_bias, vocab_size):
        raise InvalidRequest(f"A logit_bias token is outside the vocabulary of {vocab_size}.", param="logit_bias")


def _all_within(tokens: Iterable[int], vocab_size: int) -> bool:
    return all(0 <= token < vocab_size for token in tokens)
