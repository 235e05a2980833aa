"""What the in-process benchmarks share: random llamas, the engine and bare mlx_lm BatchGenerator behind one face, and
turns in which both do the same work.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import load as load_tokenizer

from scheduler.request import InferenceRequest, SamplingParams
from workers.backend import JobProgress
from workers.demo_model import weights_path
from workers.engine.engine import Engine, EngineConfig, PreparedJob
from workers.engine.loader import LoadedModel, load

_VOCAB = 1024
_SIZES = {"tiny": (64, 2, 192, 4, 2), "small": (256, 6, 768, 8, 4)}
MODELS = (*_SIZES, "demo")

Said = dict[int, list[int]]


class Generator(Protocol):
    """Something that generates for several requests at once; requests are known by the number `add` returns."""

    def add(self, prompt: list[int], tokens: int) -> int: ...

    def step(self) -> list[tuple[int, int]]:
        """(request, token) of all that became visible; at least one step."""
        ...

    def cancel(self, request: int) -> None: ...

    def close(self) -> None: ...


class Bare:
    """mlx_lm's BatchGenerator and nothing around it."""

    def __init__(self, model: nn.Module, temperature: float = 0.0) -> None:
        self._generator = BatchGenerator(
            model, completion_batch_size=32, prefill_batch_size=32, sampler=make_sampler(temperature)
        )

    def add(self, prompt: list[int], tokens: int) -> int:
        (request,) = self._generator.insert([prompt], max_tokens=[tokens], **self._choices())
        return request

    def _choices(self) -> dict[str, Any]:
        """What `insert` is told of the next request's sampling."""
        return {}

    def step(self) -> list[tuple[int, int]]:
        return [(response.uid, response.token) for response in self._generator.next_generated()]

    def cancel(self, request: int) -> None:
        self._generator.remove([request])

    def close(self) -> None:
        self._generator.close()


class Ours:
    """The engine, text and finish reasons included."""

    def __init__(self, engine: Engine, temperature: float = 0.0) -> None:
        self._engine = engine
        self._temperature = temperature
        self._added = 0

    def add(self, prompt: list[int], tokens: int) -> int:
        self._added += 1
        request = InferenceRequest(model="bench", messages=(), sampling=self._params(tokens))
        self._engine.add(PreparedJob(str(self._added), 1, tuple(prompt), request))
        return self._added

    def _params(self, tokens: int) -> SamplingParams:
        """The next request's sampling."""
        return SamplingParams(temperature=self._temperature, max_tokens=tokens, ignore_eos=True)

    def step(self) -> list[tuple[int, int]]:
        gained: list[tuple[int, int]] = []
        for event in self._engine.step():
            if isinstance(event, JobProgress):
                for choice in event.choices:
                    gained += [(int(event.job_id), token) for token in choice.token_ids]
        return gained

    def cancel(self, request: int) -> None:
        self._engine.cancel(str(request), 1)

    def close(self) -> None:
        while self._engine.has_work:
            self._engine.step()


@dataclass(frozen=True, slots=True)
class Turn:
    """One generator's tokens per second, and what every request said."""

    tokens_per_s: float
    said: list[list[int]]


def new_model(name: str, vocab_size: int = _VOCAB) -> LoadedModel:
    """`tiny` and `small` are llamas with random weights."""
    if name == "demo":
        return load(weights_path(), "demo")
    hidden, layers, inner, heads, kv_heads = _SIZES[name]
    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-5,
            vocab_size=vocab_size,
            tie_word_embeddings=True,
        )
    )
    mx.eval(model.parameters())
    return LoadedModel(
        model=model,
        tokenizer=load_tokenizer(weights_path()),
        name=name,
        path=Path(name),
        context_tokens=8192,
        vocab_size=vocab_size,
        eos_ids=frozenset(),
        dtype=mx.float32,
        config={},
    )


def prompt(seed: int, tokens: int) -> list[int]:
    """A prompt of its own for every seed, so that no prefix cache helps."""
    return [(seed * 131 + at * at * 7 + at * 3) % 900 + 1 for at in range(tokens)]


def arguments_of(description: str | None, *, tokens: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--no-compile", action="store_true")
    return parser


def warm_engine(loaded: LoadedModel, *, compile_steps: bool) -> Engine:
    engine = Engine(loaded, EngineConfig(compile=compile_steps))
    engine.warm_up()
    while engine.warm_next():
        pass
    return engine


def print_machine(arguments: argparse.Namespace) -> None:
    blas = os.environ.get("LD_PRELOAD", "") or "the wheel's"
    print(f"{platform.machine()}, {os.cpu_count()} cores, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, ", end="")
    print(f"BLAS: {blas}, g++: {shutil.which('g++')}, compile: {not arguments.no_compile}")
    print(f"model {arguments.model}, {arguments.tokens} tokens per request, tokens/s:", flush=True)


def compare(
    name: str,
    rounds: int,
    generators: Iterable[Callable[[], Generator]],
    work: Callable[[Generator, int], Turn],
    *,
    same_answers: bool = True,
) -> str:
    """A line of medians and ratios: the work done by bare and ours, in turns; the first turn warms both up.

    Answers are compared unless the two draw from different random streams.
    """
    bare: list[float] = []
    ours: list[float] = []
    differ = 0
    for turn in range(rounds + 1):
        theirs, mine = (_turn(make, work, turn) for make in generators)
        differ += sum(one != other for one, other in zip(theirs.said, mine.said, strict=True))
        if turn:
            bare.append(theirs.tokens_per_s)
            ours.append(mine.tokens_per_s)
    ratios = sorted(mine / theirs for mine, theirs in zip(ours, bare, strict=True))
    return (
        f"{name}  BatchGenerator {statistics.median(bare):>7.0f} ({min(bare):.0f}-{max(bare):.0f})"
        f"  engine {statistics.median(ours):>7.0f} ({min(ours):.0f}-{max(ours):.0f})"
        f"  ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        + (f", {differ} answers differ" if same_answers else "")
    )


def _turn(make: Callable[[], Generator], work: Callable[[Generator, int], Turn], turn: int) -> Turn:
    generator = make()
    try:
        return work(generator, turn)
    finally:
        generator.close()
