"""routing.plan: names to pools, and errors that help."""

from __future__ import annotations

import pytest

from scheduler.errors import NoModelYet, UnknownModel
from scheduler.model_card import ModelCard
from scheduler.routing import plan

CARDS = [ModelCard(id="demo", context_tokens=1), ModelCard(id="org/Qwen3-4B", context_tokens=1, position=1)]


def test_an_exact_id_goes_to_its_pool() -> None:
    target = plan("org/Qwen3-4B", CARDS)
    assert target.pool == "org/Qwen3-4B" and target.card is CARDS[1]


def test_default_is_the_first_model() -> None:
    assert plan("default", CARDS).pool == "demo"


def test_a_model_that_is_called_default_wins_over_the_alias() -> None:
    cards = [*CARDS, ModelCard(id="default", context_tokens=1, position=2)]
    assert plan("default", cards).card is cards[2]


@pytest.mark.parametrize("typo", ["dmeo", "Demo", "demo2"])
def test_an_unknown_name_gets_its_near_matches(typo: str) -> None:
    with pytest.raises(UnknownModel, match="did you mean 'demo'") as refused:
        plan(typo, CARDS)
    assert refused.value.param == "model" and refused.value.fault == "client"


def test_a_name_like_none_lists_what_is_served() -> None:
    with pytest.raises(UnknownModel, match="served are 'demo', 'org/Qwen3-4B'"):
        plan("zzzzzz", CARDS)


@pytest.mark.parametrize("model", ["default", "demo"])
def test_with_nothing_served_yet_a_client_may_come_again(model: str) -> None:
    with pytest.raises(NoModelYet, match="No worker serves a model yet") as refused:
        plan(model, [])
    assert refused.value.fault == "server" and refused.value.retry_after_s


def test_an_absurdly_long_name_is_not_repeated_whole() -> None:
    with pytest.raises(UnknownModel) as refused:
        plan("x" * 10_000, CARDS)
    assert len(refused.value.message) < 400
