"""Small random models and a driver for the engine tests: add jobs, step to the end, read what each job said."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from scheduler.request import InferenceRequest, SamplingParams, Usage
from scheduler.tokens import ChoiceDelta, PositionLogprobs
from workers.backend import BackendEvent, ChoiceProgress, JobDone, JobError, JobProgress
from workers.demo_model import weights_path
from workers.engine.engine import Engine, EngineConfig, PreparedJob
from workers.engine.loader import LoadedModel
from workers.engine.slot_lane import SlotLane

VOCAB = 320
EOS = 319


def tiny_llama(
    layer_types: list[str] | None = None, sliding_window: int | None = None, kind: type[llama.Model] = llama.Model
) -> nn.Module:
    """A llama with random fp32 weights, lively enough not to say the same token twice in a row for long."""
    mx.random.seed(7)
    model = kind(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=48,
            num_hidden_layers=2,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=VOCAB,
            tie_word_embeddings=False,
            layer_types=layer_types,
            sliding_window=sliding_window,
        )
    )
    model.apply(lambda weight: weight * 2 if weight.ndim == 2 else weight)
    mx.eval(model.parameters())
    return model


_tokenizers: list[TokenizerWrapper] = []


def tokenizer() -> TokenizerWrapper:
    """The demo model's tokenizer; its vocabulary is larger than the random models'."""
    if not _tokenizers:
        _tokenizers.append(load_tokenizer(weights_path()))
    return _tokenizers[0]


def loaded(model: nn.Module, *, context_tokens: int = 1024, eos_ids: frozenset[int] = frozenset({EOS})) -> LoadedModel:
    return LoadedModel(
        model=model,
        tokenizer=tokenizer(),
        name="tiny",
        path=Path("tiny"),
        context_tokens=context_tokens,
        vocab_size=VOCAB,
        eos_ids=eos_ids,
        dtype=mx.float32,
        config={},
    )


def config(**changes: int | bool) -> EngineConfig:
    """Small rows and pages, nothing compiled (a compiled step is tested by itself)."""
    values: dict[str, int | bool] = {"max_rows": 8, "page_tokens": 8, "compile": False, "kv_budget_bytes": 1 << 24}
    return EngineConfig(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def prompt(seed: int, tokens: int) -> tuple[int, ...]:
    """A prompt that depends on `seed`; never the end-of-text token."""
    return tuple((seed * 37 + at * at * 11 + at * 5) % (EOS - 1) + 1 for at in range(tokens))


def job(
    name: str,
    prompt_ids: tuple[int, ...],
    params: SamplingParams,
    *,
    n: int = 1,
    rank: int = 1,
    progress: tuple[ChoiceProgress, ...] = (),
    attempt: int = 1,
) -> PreparedJob:
    request = InferenceRequest(model="tiny", messages=(), sampling=params, n=n)
    return PreparedJob(name, attempt, prompt_ids, request, rank, progress)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


def seeded(seed: int, max_tokens: int, temperature: float = 1.0) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)


def reference(
    model: nn.Module, prompt_ids: tuple[int, ...], max_tokens: int, eos_ids: frozenset[int] = frozenset({EOS})
) -> list[int]:
    """What mlx_lm says greedily, up to a token that ends the text."""
    said: list[int] = []
    for token, _ in generate_step(mx.array(prompt_ids), model, max_tokens=max_tokens):
        if token in eos_ids:
            break
        said.append(int(token))
    return said


@dataclass
class Choice:
    tokens: list[int] = field(default_factory=list[int])
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[PositionLogprobs] = field(default_factory=list[PositionLogprobs])

    def take(self, delta: ChoiceDelta) -> None:
        assert self.finish_reason is None, "a delta after the last one"
        self.tokens.extend(delta.token_ids)
        self.text += delta.text
        self.finish_reason = delta.finish_reason
        self.logprobs.extend(delta.logprobs)

    def progress(self, index: int) -> ChoiceProgress:
        return ChoiceProgress(index, tuple(self.tokens), self.text, self.finish_reason)


@dataclass
class Outcome:
    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])
    usage: Usage | None = None
    error: JobError | None = None

    @property
    def tokens(self) -> list[int]:
        return self.choices[0].tokens if self.choices else []

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason


class Stage:
    """An engine and what its jobs said so far; the books are checked after every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.jobs: dict[str, Outcome] = {}

    def add(self, *jobs: PreparedJob) -> None:
        for prepared in jobs:
            self.jobs.setdefault(prepared.job_id, Outcome())
            self.engine.add(prepared)

    def step(self) -> list[BackendEvent]:
        events = self.engine.step()
        for event in events:
            self._take(event)
        self.engine.check_integrity()
        return events

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Step until nothing is left, or `until` says so."""
        for _ in range(20_000):
            if not self.engine.has_work or until():
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def _take(self, event: BackendEvent) -> None:
        outcome = self.jobs[event.job_id]
        assert outcome.usage is None and outcome.error is None, "an event after the end"
        match event:
            case JobProgress():
                for delta in event.choices:
                    outcome.choices.setdefault(delta.index, Choice()).take(delta)
            case JobDone():
                outcome.usage = event.usage
            case JobError():
                outcome.error = event


def stage(model: nn.Module, **changes: int | bool) -> Stage:
    return Stage(Engine(loaded(model), config(**changes)))


def run_alone(model: nn.Module, prepared: PreparedJob, **changes: int | bool) -> Outcome:
    """The job's outcome in an engine of its own."""
    alone = stage(model, **changes)
    alone.add(prepared)
    alone.run()
    return alone.jobs[prepared.job_id]


def slot_lane(on: Stage) -> SlotLane:
    lane = on.engine.lane
    assert isinstance(lane, SlotLane)
    return lane


def assert_all_free(on: Stage) -> None:
    """No sequence holds anything: every page in use is held by the prefix cache alone."""
    assert on.engine.busy_rows == 0 and on.engine.waiting == 0
    lane = slot_lane(on)
    lane.pages.check_integrity([])


def outcomes(on: Stage, names: Iterable[str]) -> list[list[int]]:
    return [on.jobs[name].tokens for name in names]
