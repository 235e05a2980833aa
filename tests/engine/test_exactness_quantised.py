"""Models of 4- and 8-bit weights load and batch: in company they say what they say alone, and what mlx_lm says."""

from __future__ import annotations

import mlx.core as mx
import msgspec
import pytest
from mlx_lm.generate import generate_step

from scheduler.request import SamplingParams
from tests.engine.engine_stage import Stage, config, greedy, job, prompt, seeded
from tests.engine.model_zoo import zoo_model
from workers.engine.engine import Engine

WAYS = (greedy(30), seeded(3, 30), greedy(30), seeded(4, 30, temperature=0.7))


def _said(name: str, bits: int, *jobs: tuple[tuple[int, ...], SamplingParams]) -> list[list[int]]:
    on = Stage(Engine(zoo_model(name, bits), config(prefill_stall_ms=1)))
    for at, (ids, params) in enumerate(jobs):
        on.add(job(f"job-{at}", ids, msgspec.structs.replace(params, ignore_eos=True)))
        on.step()
    on.run()
    return [on.jobs[f"job-{at}"].tokens for at in range(len(jobs))]


@pytest.mark.parametrize("name", ["wide-llama", "wide-lfm2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_says_in_company_what_it_says_alone(name: str, bits: int) -> None:
    model = zoo_model(name, bits)
    assert model.config["quantization"]["bits"] == bits and model.dtype == mx.float32
    jobs = [(prompt(at, 9 + 20 * at), params) for at, params in enumerate(WAYS)]
    together = _said(name, bits, *jobs)
    for said, (ids, params) in zip(together, jobs, strict=True):
        if params.is_greedy:
            steps = generate_step(mx.array(ids), model.model, max_tokens=30)
            assert said == [int(token) for token, _ in steps]
        else:
            assert [said] == _said(name, bits, (ids, params))


def test_quantising_changes_what_a_model_says() -> None:
    """Else the tests above would prove nothing."""
    answers = {tuple(_said("wide-llama", bits, (prompt(1, 30), greedy(30)))[0]) for bits in (4, 8)}
    assert len(answers) == 2
