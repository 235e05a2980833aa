"""Decode speed in process: the engine beside bare mlx_lm BatchGenerator, same weights, same BLAS, in turns.

    TMPDIR=/some/private/dir python -m benchmarks.engine_decode [--model tiny|demo] [--rows 1,8,32] [--rounds 5]

Prints, per number of rows, the median tokens/s of each, and the median and range of the ratio round by round.
Greedy; the run fails where the two do not say the same tokens. `tiny` is a random llama (hidden 64, 2 layers).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

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

PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """One generator, once. Speed counts from the step at which every row had its first token."""

    tokens_per_s: float
    tokens: list[list[int]]


def _tiny() -> LoadedModel:
    mx.random.seed(0)
    arguments = ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=1024,
        tie_word_embeddings=True,
    )
    model = Model(arguments)
    mx.eval(model.parameters())
    return LoadedModel(
        model=model,
        tokenizer=load_tokenizer(weights_path()),
        name="tiny",
        path=Path("tiny"),
        context_tokens=2048,
        vocab_size=1024,
        eos_ids=frozenset(),
        dtype=mx.float32,
        config={},
    )


def _prompts(rows: int, turn: int) -> list[list[int]]:
    """A fresh prompt per row and turn, so that no prefix cache helps."""
    return [[(turn * 131 + row * 7 + at * 3) % 900 + 1 for at in range(PROMPT_TOKENS)] for row in range(rows)]


def _bare(model: nn.Module, prompts: list[list[int]], tokens: int, temperature: float) -> Turn:
    generator = BatchGenerator(
        model, max_tokens=tokens, completion_batch_size=32, prefill_batch_size=32, sampler=make_sampler(temperature)
    )
    ids = generator.insert(prompts)
    said: dict[int, list[int]] = {uid: [] for uid in ids}
    started_s, counted = 0.0, 0
    while responses := generator.next_generated():
        for response in responses:
            said[response.uid].append(response.token)
        counted += len(responses)
        if not started_s and all(said.values()):
            started_s, counted = time.perf_counter(), 0
    generator.close()
    return Turn(counted / (time.perf_counter() - started_s), [said[uid] for uid in ids])


def _ours(engine: Engine, prompts: list[list[int]], tokens: int, temperature: float) -> Turn:
    params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True)
    request = InferenceRequest(model="bench", messages=(), sampling=params)
    for row, prompt in enumerate(prompts):
        engine.add(PreparedJob(f"job-{row}", 1, tuple(prompt), request))
    said: list[list[int]] = [[] for _ in prompts]
    started_s, counted = 0.0, 0
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, JobProgress):
                for choice in event.choices:
                    said[int(event.job_id.removeprefix("job-"))].extend(choice.token_ids)
                    counted += len(choice.token_ids)
        if not started_s and all(said):
            started_s, counted = time.perf_counter(), 0
    return Turn(counted / (time.perf_counter() - started_s), said)


def _compare(loaded: LoadedModel, engine: Engine, rows: int, arguments: argparse.Namespace) -> str:
    bare: list[float] = []
    ours: list[float] = []
    for turn in range(arguments.rounds + 1):
        prompts = _prompts(rows, turn)
        theirs = _bare(loaded.model, prompts, arguments.tokens, arguments.temperature)
        mine = _ours(engine, prompts, arguments.tokens, arguments.temperature)
        if arguments.temperature == 0 and theirs.tokens != mine.tokens:
            raise SystemExit(f"{rows} rows: the two do not say the same tokens")
        if turn:  # the first turn warms both up
            bare.append(theirs.tokens_per_s)
            ours.append(mine.tokens_per_s)
    ratios = sorted(mine / theirs for mine, theirs in zip(ours, bare, strict=True))
    return (
        f"{rows:>4} rows  BatchGenerator {statistics.median(bare):>8.0f}  engine {statistics.median(ours):>8.0f}  "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("tiny", "demo"), default="tiny")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    loaded = _tiny() if arguments.model == "tiny" else load(weights_path(), "demo")
    engine = Engine(loaded, EngineConfig(compile=not arguments.no_compile))
    engine.warm_up()
    while engine.warm_next():
        pass
    blas = os.environ.get("LD_PRELOAD", "") or "the wheel's"
    print(f"{platform.machine()}, {os.cpu_count()} cores, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, ", end="")
    print(f"BLAS: {blas}, g++: {shutil.which('g++')}, compile: {not arguments.no_compile}")
    print(f"model {arguments.model}, {arguments.tokens} tokens per row, temperature {arguments.temperature}, tokens/s:")
    for rows in arguments.rows.split(","):
        print(_compare(loaded, engine, int(rows), arguments), flush=True)


if __name__ == "__main__":
    main()
