"""The model that ships says greedily in a batch what mlx_lm says alone."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.generate import generate_step

from tests.engine.engine_stage import Stage, config, greedy, job
from workers.demo_model import weights_path
from workers.engine.engine import Engine
from workers.engine.loader import load

QUESTIONS = ("Hello!", "Count from 7 to 25.", "Who are you?", "What is 12 + 7?", "Spell the word harbour.")
TOKENS = 48


def test_the_demo_model_says_what_mlx_lm_says() -> None:
    demo = load(weights_path(), "demo")
    prompts = [
        tuple(demo.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True))
        for text in QUESTIONS
    ]
    on = Stage(Engine(demo, config()))
    for at, ids in enumerate(prompts):
        on.add(job(f"job-{at}", ids, greedy(TOKENS)))
        on.step()
    on.run()
    for at, ids in enumerate(prompts):
        expected = [int(token) for token, _ in generate_step(mx.array(ids), demo.model, max_tokens=TOKENS)]
        ends = [where for where, token in enumerate(expected) if token in demo.eos_ids]
        assert on.jobs[f"job-{at}"].tokens == expected[: ends[0] if ends else None], QUESTIONS[at]
