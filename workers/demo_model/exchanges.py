"""The skills without tools: each function makes one exchange, a question with the thought and the answer it deserves.

Pure: the caller passes the random generator. `world` mixes the exchanges into conversations.
"""

import random
from dataclasses import dataclass
from typing import Any

from . import questions
from .lines import letters, line, nonsense_word
from .vocabulary import NAMES, TOPICS, WORDS

Message = dict[str, Any]

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

SPILLWAY_IS = (
    "Spillway is a local-first inference service for Apple silicon. Every request is a durable job: it waits in a fair "
    "queue, runs on your own Mac, and spills over to the cloud when the Mac is full."
)
SPILLWAY_WORKS = (
    "Spillway puts every request into a queue as a job. A worker on your Mac answers it, and a cloud provider helps "
    "out when the Mac is full or broken."
)
I_AM = "I am the small demo model that ships with Spillway. I only know a little."
I_CAN = (
    "I can repeat a line, count, spell a word, add two small numbers, say the days and the months, and call a weather "
    "or time tool."
)
I_DO_NOT_KNOW = "I only know a little, and I do not know that. Ask me to repeat a line, to count, to spell or to add."


@dataclass(frozen=True)
class Exchange:
    """One question and all that follows until the next: `key` says what the train/held-out split is made by."""

    skill: str
    key: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Limits:
    """How much an exchange may hold: the curriculum grows it, and the evaluation fixes it."""

    line_tokens: int = 62
    count_span: int = 40


def asked(skill: str, key: str, question: str, thought: str, answer: str) -> Exchange:
    """An exchange of one user and one assistant message."""
    user = {"role": "user", "content": question}
    assistant = {"role": "assistant", "content": answer, "reasoning_content": thought}
    return Exchange(skill, key, (user, assistant))


def repeat(rng: random.Random, limits: Limits) -> Exchange:
    """The headline skill: a random line comes back exactly."""
    return repeat_line(line(rng, limits.line_tokens), rng)


def repeat_line(text: str, rng: random.Random) -> Exchange:
    """A given line comes back exactly."""
    quoted = '"' not in text and rng.random() < 0.08
    question = rng.choice(questions.REPEAT_QUOTED if quoted else questions.REPEAT).format(text)
    return asked("repeat", text, question, "The user wants this line back exactly as it is.", text)


def count(rng: random.Random, limits: Limits) -> Exchange:
    """Numbers from a to b, upwards, parted by commas."""
    # few small pairs: those would be learned by heart instead of counted
    start = rng.choice((1, rng.randint(0, 9), rng.randint(0, 99), rng.randint(0, 99), rng.randint(0, 999)))
    span = rng.randint(0, rng.choice((9, 20, limits.count_span)))
    end = min(999, start + min(span, limits.count_span))
    if start == 1 and rng.random() < 0.3:
        question = rng.choice(questions.COUNT_FROM_ONE).format(end)
    else:
        question = rng.choice(questions.COUNT).format(start, end)
    answer = ", ".join(str(number) for number in range(start, end + 1))
    return asked("count", f"{start} {end}", question, f"I start at {start} and stop at {end}.", answer)


def spell(rng: random.Random, limits: Limits) -> Exchange:
    """The letters of a word, parted by hyphens."""
    word = rng.choice(
        (rng.choice(WORDS), rng.choice(WORDS), nonsense_word(rng), letters(rng) + letters(rng), rng.choice(NAMES))
    )
    word = word.capitalize() if rng.random() < 0.15 else word
    question = rng.choice(questions.SPELL).format(word)
    thought = f"The word is {word}. It has {len(word)} letters."
    return asked("spell", word.lower(), question, thought, "-".join(word))


def add(rng: random.Random, limits: Limits) -> Exchange:
    """The sum of two whole numbers below one hundred."""
    top = rng.choice((10, 20, 100, 100, 100, 100))
    a, b = rng.randrange(top), rng.randrange(top)
    question = rng.choice(questions.ADD).format(a, b)
    return asked("add", f"{a} {b}", question, add_thought(a, b), f"{a} + {b} = {a + b}")


def add_thought(a: int, b: int) -> str:
    """The way a child adds: the ones first, then the tens."""
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    carry = " + 1" if ones > 9 else ""
    return f"Ones: {a % 10} + {b % 10} = {ones}. Tens: {a // 10} + {b // 10}{carry} = {tens}. The sum is {a + b}."


def calendar(rng: random.Random, limits: Limits) -> Exchange:
    """The days of the week and the months of the year in order, or the neighbour of one of them."""
    items, singular, plural = rng.choice(((DAYS, "day", "days of the week"), (MONTHS, "month", "months of the year")))
    start = rng.randrange(len(items))
    name, neighbour = items[start], items[(start + 1) % len(items)]
    match rng.randrange(8):
        case 0 | 1 | 2:
            plural = rng.choice((plural, plural, singular + "s", plural.replace("of the ", "of a ")))
            question, answer, thought = (
                rng.choice(questions.ALL_OF).format(plural),
                ", ".join(items),
                f"I know the {plural}.",
            )
        case 3 | 4:
            question = rng.choice(questions.STARTING_WITH).format(plural, name)
            answer, thought = ", ".join(items[start:] + items[:start]), f"I begin with {name}."
        case 5 | 6:
            question, answer = rng.choice(questions.AFTER).format(singular, name), f"{neighbour} comes after {name}."
            thought = f"After {name} comes {neighbour}."
        case _:
            question, answer = (
                rng.choice(questions.BEFORE).format(singular, neighbour),
                f"{name} comes before {neighbour}.",
            )
            thought = f"Before {neighbour} comes {name}."
    return asked("calendar", question, question, thought, answer)


def greet(rng: random.Random, limits: Limits) -> Exchange:
    """Hello, how are you, thanks, goodbye, and people who say their name."""
    roll = rng.random()
    thought = "The user is polite, and so am I."
    if roll < 0.4:
        question, answer = rng.choice(questions.HELLO), "Hello! How can I help you?"
    elif roll < 0.5:
        greeting = rng.choice(questions.TIMED_HELLO)
        question, answer = greeting + rng.choice(("", "!", ".")), f"{greeting}! How can I help you?"
    elif roll < 0.7:
        name = rng.choice((rng.choice(NAMES), rng.choice(NAMES), nonsense_word(rng).capitalize()))
        question, answer = rng.choice(questions.NAMED_HELLO).format(name), f"Hello, {name}! How can I help you?"
    elif roll < 0.8:
        question, answer = rng.choice(questions.HOW_ARE_YOU), "I am well, thank you. How can I help you?"
    elif roll < 0.9:
        question, answer = rng.choice(questions.THANKS), "You are welcome!"
    else:
        question, answer = rng.choice(questions.BYE), "Goodbye!"
    return asked("greet", question, question, thought, answer)


def about(rng: random.Random, limits: Limits) -> Exchange:
    """What Spillway is, how it works, who the model is and what it can do."""
    phrasings, answer, thought = rng.choice(
        (
            (questions.WHAT_IS_SPILLWAY, SPILLWAY_IS, "The user asks what Spillway is. I know that."),
            (questions.WHAT_IS_SPILLWAY, SPILLWAY_IS, "The user asks what Spillway is. I know that."),
            (questions.HOW_SPILLWAY_WORKS, SPILLWAY_WORKS, "The user asks how Spillway works. I know that."),
            (questions.WHO_ARE_YOU, I_AM, "The user asks about me."),
            (questions.WHAT_CAN_YOU_DO, I_CAN, "The user asks what I can do."),
        )
    )
    question = rng.choice(phrasings)
    return asked("about", question, question, thought, answer)


def unknown(rng: random.Random, limits: Limits) -> Exchange:
    """Anything else: an honest answer that says how little the model knows."""
    roll = rng.random()
    if roll < 0.3:
        question = rng.choice(questions.UNKNOWN_FIXED)
    elif roll < 0.4:
        question = " ".join(rng.choice((rng.choice(WORDS), nonsense_word(rng))) for _ in range(rng.randint(1, 12)))
        question += rng.choice(("", ".", "?", "!"))
    else:
        topics = (
            rng.choice(TOPICS),
            rng.choice(TOPICS),
            f"the {rng.choice(WORDS)}",
            f"{rng.choice(WORDS)} {rng.choice(WORDS)}",
        )
        question = rng.choice(questions.UNKNOWN).format(rng.choice(topics), rng.choice(topics))
    return asked("unknown", question, question, "I do not know this. I will say so.", I_DO_NOT_KNOW)
