"""What a scripted job says: the same words for producers, who expect them, and for the worker, who says them."""

from __future__ import annotations

import msgspec

MODEL = "scripted"


class Script(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The last user message of a scripted job, as JSON. Token ids are 0, 1, 2 …, whatever the attempt."""

    tag: str
    words: int
    pause_ms: float = 10.0
    poison_at: int | None = None  # from this position on, every attempt kills its worker
    failures: int = 0  # this many attempts end in an error that is retried

    def word(self, position: int) -> str:
        return f"{self.tag}.{position} "

    @property
    def text(self) -> str:
        return "".join(self.word(position) for position in range(self.words))


def encode_script(script: Script) -> str:
    return msgspec.json.encode(script).decode()


def decode_script(text: str) -> Script:
    return msgspec.json.decode(text, type=Script)
