"""The demo model's small world: seeded conversations, with a split into what it trains on and what is held out.

Pure and without PyTorch: `train` draws from it for ever, `evaluate` draws the held-out side.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from . import exchanges, questions
from .exchanges import Exchange, Limits, Message
from .tool_exchanges import Tool, ask, toolbox
from .vocabulary import SYSTEM_PROMPTS, WORDS

Split = Literal["train", "held_out"]
Thinking = Literal["no", "cue", "asked"]

MAKERS: dict[str, Callable[[random.Random, Limits], Exchange]] = {
    "repeat": exchanges.repeat,
    "count": exchanges.count,
    "spell": exchanges.spell,
    "add": exchanges.add,
    "calendar": exchanges.calendar,
    "greet": exchanges.greet,
    "about": exchanges.about,
    "unknown": exchanges.unknown,
}
SPLIT_SKILLS = ("repeat", "count", "spell", "add", "calendar", "unknown", "tool")
DEFAULT_MIX: dict[str, float] = {
    "repeat": 8.0, "count": 4.5, "spell": 3.5, "add": 4.5, "calendar": 1.2, "greet": 0.7, "about": 0.6, "unknown": 1.3,
    "tool": 3.0,
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Messages as a client sends them. `thinking` is the template's `enable_thinking`."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, object], ...] = ()
    thinking: bool = False
    skill: str = ""


@dataclass(frozen=True)
class Recipe:
    """What conversations are drawn: the mix of skills, their limits, and how often each trimming comes along."""

    mix: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))
    limits: Limits = field(default_factory=Limits)
    thinking_share: float = 0.2
    system_share: float = 0.4
    long_system_share: float = 0.03


def is_held_out(exchange: Exchange) -> bool:
    """One key in ten is never trained on: lines, number pairs, words and tool questions."""
    key = f"{exchange.skill}:{exchange.key}"
    return zlib.crc32(key.encode()) % 10 == 0


def draw(make: Callable[[], Exchange], split: Split) -> Exchange:
    """An exchange of the wanted split; skills with a fixed set of phrasings have no held-out side."""
    while True:
        exchange = make()
        if exchange.skill not in SPLIT_SKILLS or is_held_out(exchange) == (split == "held_out"):
            return exchange


def draw_with_tools(rng: random.Random, split: Split) -> tuple[Exchange, tuple[Tool, ...]]:
    """An exchange that takes a call, and the tools it was asked with."""
    while True:
        tools = toolbox(rng)
        exchange = ask(tools, rng)
        if exchange.skill == "tool" and is_held_out(exchange) == (split == "held_out"):
            return exchange, tools


def system_prompt(rng: random.Random, recipe: Recipe) -> list[Message]:
    """Mostly none, often a common one, seldom a long and pointless one."""
    if rng.random() >= recipe.system_share:
        return []
    if rng.random() >= recipe.long_system_share / recipe.system_share:
        return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}]
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS) + " " + filler(rng, rng.randint(20, 150))}]


def filler(rng: random.Random, size: int) -> str:
    """Sentences without sense, which the model must read past."""
    text = ""
    while size > 0:
        length = rng.randint(4, 12)
        text += " ".join(rng.choices(WORDS, k=length)).capitalize() + ". "
        size -= length
    return text.strip()


def pick_exchange(rng: random.Random, recipe: Recipe, tools: tuple[Tool, ...], split: Split) -> Exchange:
    """The next exchange of a conversation: a tool question only where there are tools."""
    mix = recipe.mix if tools else {name: share for name, share in recipe.mix.items() if name != "tool"}
    boosted = {name: share * (8 if tools and name == "tool" else 1) for name, share in mix.items()}
    skill = rng.choices(list(boosted), list(boosted.values()))[0]
    if skill == "tool":
        return draw(lambda: ask(tools, rng), split)
    return draw(lambda: MAKERS[skill](rng, recipe.limits), split)


def conversation(rng: random.Random, recipe: Recipe, turns: int, split: Split = "train") -> Conversation:
    """A conversation of `turns` exchanges that mixes the skills; the last one may be answered after a thought."""
    with_tools = rng.random() < recipe.mix.get("tool", 0.0) / max(1e-9, sum(recipe.mix.values()))
    tools = toolbox(rng) if with_tools else ()
    drawn = [pick_exchange(rng, recipe, tools, split) for _ in range(turns)]
    return assemble(drawn, tools, system_prompt(rng, recipe), draw_thinking(rng, recipe), rng)


def draw_thinking(rng: random.Random, recipe: Recipe) -> Thinking:
    """Whether the last answer is thought over, and who asked for it: the template or the user."""
    if rng.random() >= recipe.thinking_share:
        return "no"
    return "cue" if rng.random() < 0.7 else "asked"


def assemble(
    drawn: list[Exchange], tools: tuple[Tool, ...], system: list[Message], thinking: Thinking, rng: random.Random
) -> Conversation:
    """Join exchanges into one conversation; only the last keeps its thoughts, as the chat template does."""
    messages = list(system)
    for exchange in drawn[:-1]:
        messages += [without_thought(message) for message in exchange.messages]
    last = list(drawn[-1].messages)
    if thinking == "no":
        last = [without_thought(message) for message in last]
    elif thinking == "asked":
        after = () if drawn[-1].skill == "repeat" else questions.THINK_AFTER
        pattern = rng.choice(questions.THINK_BEFORE + after)
        last = [last[0] | {"content": pattern.format(last[0]["content"])}, last[1]]
        last += [without_thought(message) for message in drawn[-1].messages[2:]]
    schemas = tuple(tool.schema for tool in tools)
    return Conversation(tuple(messages + last), schemas, thinking == "cue", drawn[-1].skill)


def without_thought(message: Message) -> Message:
    """The message as it stands in the history."""
    return {name: value for name, value in message.items() if name != "reasoning_content"}
