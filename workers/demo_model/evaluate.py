"""Held-out accuracy per skill, by greedy decoding with unmodified mlx-lm: python -m workers.demo_model.evaluate

An answer counts only if every character is the expected one. Prints the table and writes it to EVALUATION.md.
"""

import argparse
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_lm import batch_generate, load

from . import weights_path
from .exchanges import Exchange, Limits, Message, count, repeat_line
from .lines import LINE_KINDS, LineKind, alike, code, digit_run, few_words, line, mixed, one_kind, sentence
from .rendering import pieces
from .world import MAKERS, Conversation, Recipe, Thinking, assemble, conversation, draw, draw_with_tools, system_prompt

LIMITS = Limits(line_tokens=62, count_span=60)
MAX_TOKENS = 1000
ROWS = 64


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, and the only right answer."""

    prompt: list[int]
    expected: str


@dataclass(frozen=True)
class Exam:
    """Questions about one skill: `make` draws a conversation, `answer` says which of its answers is asked for."""

    name: str
    samples: int
    make: Callable[[random.Random], Conversation]
    answer: int = -1


@dataclass(frozen=True)
class Mark:
    """How an exam went."""

    name: str
    samples: int
    right: int
    wrong: tuple[tuple[str, str], ...]


def single(exchange: Exchange, rng: random.Random, thinking: Thinking = "no") -> Conversation:
    """One exchange, now and then behind a system prompt."""
    return assemble([exchange], (), system_prompt(rng, replace(Recipe(), long_system_share=0.0)), thinking, rng)


def of_skill(skill: str, thinking: Thinking = "no") -> Callable[[random.Random], Conversation]:
    """Single-turn conversations of a skill."""
    return lambda rng: single(draw(lambda: MAKERS[skill](rng, LIMITS), "held_out"), rng, thinking)


def any_skill(thinking: Thinking) -> Callable[[random.Random], Conversation]:
    """Single-turn conversations of skills in turn."""
    return lambda rng: of_skill(rng.choice(tuple(MAKERS)), thinking)(rng)


def repeat_of(*kinds: LineKind) -> Callable[[random.Random], Conversation]:
    """Single-turn conversations about lines of these kinds."""
    shares = {kind: LINE_KINDS[kind] for kind in kinds}
    return lambda rng: single(draw(lambda: repeat_line(line(rng, LIMITS.line_tokens, shares), rng), "held_out"), rng)


def long_count(rng: random.Random) -> Conversation:
    """A count over 100 to 200 numbers."""
    limits = replace(LIMITS, count_span=200)

    def make() -> Exchange:
        while len((exchange := count(rng, limits)).messages[-1]["content"].split()) < 100:
            continue
        return exchange

    return single(draw(make, "held_out"), rng)


def late_repeat(rng: random.Random) -> Conversation:
    """A line to repeat after some hundred tokens of talk about other things."""
    earlier = conversation(rng, replace(Recipe(), limits=LIMITS, thinking_share=0.0), rng.randint(5, 9))
    last = draw(lambda: MAKERS["repeat"](rng, LIMITS), "held_out")
    messages = (*earlier.messages, *(without for without in map(plain, last.messages)))
    return Conversation(messages, earlier.tools, False, "repeat")


def plain(message: Message) -> Message:
    """The message without its thought."""
    return {"role": message["role"], "content": message["content"]}


def with_tools(rng: random.Random) -> Conversation:
    """A question that takes a call."""
    exchange, tools = draw_with_tools(rng, "held_out")
    return assemble([exchange], tools, system_prompt(rng, replace(Recipe(), long_system_share=0.0)), "no", rng)


EXAMS = (
    Exam("repeat a line of words, numbers and symbols", 500, repeat_of(mixed, one_kind, sentence, code)),
    Exam("repeat a line of look-alikes such as `w17 x204 w3`", 200, repeat_of(alike)),
    Exam("repeat a run of digits", 200, repeat_of(digit_run)),
    Exam("repeat a line of two to eight words in any order", 200, repeat_of(few_words)),
    Exam("repeat a line after several hundred tokens of talk", 100, late_repeat),
    Exam("count, up to 60 numbers", 300, of_skill("count")),
    Exam("count, 100 to 200 numbers", 40, long_count),
    Exam("spell a word", 300, of_skill("spell")),
    Exam("add two numbers below 100", 300, of_skill("add")),
    Exam("add after a thought", 200, of_skill("add", "cue")),
    Exam("days and months", 200, of_skill("calendar")),
    Exam("greet", 200, of_skill("greet")),
    Exam("say what Spillway and the model are", 200, of_skill("about")),
    Exam("admit not to know", 200, of_skill("unknown")),
    Exam("call a tool", 200, with_tools, -2),
    Exam("pass a tool's result on", 200, with_tools),
    Exam("think because `enable_thinking` is set", 200, any_skill("cue")),
    Exam("think because the user asks for it", 200, any_skill("asked")),
)


def question(tokenizer: Any, drawn: Conversation, answer: int) -> Question:
    """Prompt and right answer of one of the assistant messages; checks the template against the training text."""
    made = pieces(drawn)
    learned = [index for index, piece in enumerate(made) if piece.learned]
    text = "".join(piece.text for piece in made[: learned[answer]])
    spoken = [index for index, message in enumerate(drawn.messages) if message["role"] == "assistant"]
    history = list(drawn.messages[: spoken[answer]])
    options = {"add_generation_prompt": True, "enable_thinking": drawn.thinking, "tokenize": False}
    rendered = tokenizer.apply_chat_template(history, tools=list(drawn.tools) or None, **options)
    if rendered != text:
        raise ValueError(f"the chat template and the training text differ:\n{rendered!r}\n{text!r}")
    return Question(
        tokenizer.encode(text, add_special_tokens=False), made[learned[answer]].text.removesuffix("<|im_end|>")
    )


def take(exam: Exam, model: Any, tokenizer: Any, share: float) -> Mark:
    """Put the questions to the model, many at a time."""
    rng = random.Random(f"exam {exam.name}")
    samples = max(1, round(exam.samples * share))
    asked_for = [question(tokenizer, exam.make(rng), exam.answer) for _ in range(samples)]
    asked_for.sort(key=lambda question: len(question.expected))
    longest = [min(MAX_TOKENS, len(tokenizer.encode(q.expected, add_special_tokens=False)) + 8) for q in asked_for]
    prompts = [question.prompt for question in asked_for]
    texts = batch_generate(model, tokenizer, prompts, max_tokens=longest, completion_batch_size=ROWS).texts
    wrong = tuple((q.expected, text) for q, text in zip(asked_for, texts, strict=True) if text != q.expected)
    return Mark(exam.name, samples, samples - len(wrong), wrong)


def table(marks: list[Mark]) -> str:
    """The marks as a Markdown table."""
    rows = [f"| {mark.name} | {mark.samples} | {100 * mark.right / mark.samples:.1f} % |" for mark in marks]
    return "\n".join(("| held-out exam | samples | exactly right |", "| --- | ---: | ---: |", *rows))


def main() -> None:
    """Take the exams, print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=weights_path())
    parser.add_argument("--share", type=float, default=1.0, help="take only this share of the samples")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers of each exam")
    parser.add_argument("--only", default="", help="only exams whose name holds this text")
    parser.add_argument("--out", type=Path, help="where to write the table")
    options = parser.parse_args()
    model, tokenizer = load(str(options.weights))[:2]
    started = time.monotonic()
    marks: list[Mark] = []
    for exam in EXAMS:
        if options.only not in exam.name:
            continue
        marks.append(take(exam, model, tokenizer, options.share))
        print(f"{marks[-1].name}: {marks[-1].right}/{marks[-1].samples}", flush=True)
        for expected, text in marks[-1].wrong[: options.show]:
            print(f"  expected {expected!r}\n  got      {text!r}")
    print(table(marks))
    if options.out is not None:
        machine = f"{platform.machine()} {platform.system()}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
        took = f"Greedy decoding on {machine}, {time.monotonic() - started:.0f} s."
        options.out.write_text(f"# Held-out accuracy of the demo model\n\n{table(marks)}\n\n{took}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
