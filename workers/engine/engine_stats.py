"""What the engine counted since it started."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class EngineStats:
    decode_steps: int = 0
    decode_tokens: int = 0
    prefill_steps: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    jobs_done: int = 0
    jobs_failed: int = 0

    def decoded(self, rows: int) -> None:
        self.decode_steps += 1
        self.decode_tokens += rows

    def prefilled(self, tokens: int) -> None:
        self.prefill_steps += 1
        self.prefill_tokens += tokens

    def as_dict(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in _NAMES}


_NAMES = tuple(counter.name for counter in fields(EngineStats))
