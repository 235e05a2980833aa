"""`spillway chat`: a conversation in the terminal, streamed; with piped input, one answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from api.cli.api_client import ApiClient
from api.cli.plain_text import write_answer
from scheduler.errors import InternalError, InvalidRequest, from_code
from scheduler.settings import Settings


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: what the model thinks, what it says, or that its length was not enough."""

    kind: Literal["thought", "answer", "cut"]
    text: str = ""


@dataclass(slots=True)
class Conversation:
    """What was said, and to whom."""

    model: str
    system: str | None = None
    max_tokens: int | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The request for the next answer."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        limit = {} if self.max_tokens is None else {"max_completion_tokens": self.max_tokens}
        return {"model": self.model, "stream": True, "messages": [*system, *self.turns], **limit}


def run_chat(settings: Settings, model: str, system: str | None, max_tokens: int | None) -> None:
    """Talk until Ctrl-D; where input or output is no terminal, answer the whole input once."""
    client = ApiClient(settings)
    conversation = Conversation(model, system, max_tokens)
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            from api.cli.chat_loop import ChatLoop

            ChatLoop(settings, client, conversation).run()
        else:
            answer_once(client, conversation, sys.stdin.read())
    finally:
        client.close()


def answer_once(client: ApiClient, conversation: Conversation, question: str) -> None:
    """One question, its answer to stdout as it comes; thoughts are left out."""
    if not question.strip():
        raise InvalidRequest("Nothing to ask: the input is empty.")
    conversation.turns.append({"role": "user", "content": question.removesuffix("\n")})
    for piece in answer_pieces(client, conversation):
        if piece.kind == "answer":
            write_answer(piece.text)
    sys.stdout.write("\n")


def answer_pieces(client: ApiClient, conversation: Conversation) -> Generator[Piece]:
    """The next answer, piece by piece; closing it cancels the rest. Raises SpillwayError, also in mid-stream."""
    with client.stream("POST", "/v1/chat/completions", conversation.body()) as events:
        for event in events:
            if event.data == "[DONE]":
                return
            chunk = json.loads(event.data)
            if "error" in chunk:
                raise from_code(str(chunk["error"].get("code")), str(chunk["error"]["message"]))
            for choice in chunk.get("choices", ()):
                yield from _pieces_of(choice)
    raise InternalError("The answer broke off: the server closed the connection.")


def _pieces_of(choice: dict[str, Any]) -> Iterator[Piece]:
    delta = choice["delta"]
    thought = delta.get("reasoning_content") or delta.get("reasoning")
    if thought:
        yield Piece("thought", thought)
    if delta.get("content"):
        yield Piece("answer", delta["content"])
    if choice.get("finish_reason") == "length":
        yield Piece("cut")
