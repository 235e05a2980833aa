"""Random lines to be repeated word for word. Pure: the caller passes the random generator.

The lines are meant to be unguessable, so that the model learns to copy and not to remember; several kinds have few
distinct tokens, since telling equal tokens apart by their place is the hard part of copying.
"""

import random
import string
from collections.abc import Callable

from .vocabulary import CITIES, FOREIGN_WORDS, NAMES, SYMBOLS, WORDS

CONSONANTS = "bcdfghjklmnpqrstvwxz"
VOWELS = "aeiouy"


def nonsense_word(rng: random.Random) -> str:
    """A pronounceable word that need not exist."""
    syllables = range(rng.randint(1, 3))
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(("", "", "n", "r", "s")) for _ in syllables)


def letters(rng: random.Random) -> str:
    """A short run of letters without any pattern."""
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 6)))


def number(rng: random.Random) -> str:
    """A whole number of one to five digits, now and then with a leading zero."""
    return "".join(rng.choices(string.digits, k=rng.choice((1, 1, 2, 2, 2, 3, 3, 4, 5))))


def identifier(rng: random.Random) -> str:
    """Letters and digits that stand together, such as w17, 4f9a or item_3."""
    stem = rng.choice((rng.choice(string.ascii_letters), letters(rng), rng.choice(WORDS)))
    joint = rng.choice(("", "", "", "-", "_", "."))
    return stem + joint + number(rng)


def foreign(rng: random.Random) -> str:
    """A word beyond ASCII, from the list or of random code points."""
    if rng.random() < 0.7:
        return rng.choice(FOREIGN_WORDS)
    start, end = rng.choice(((0xC0, 0x17F), (0x3B1, 0x3C9), (0x430, 0x44F), (0x4E00, 0x9FA0), (0x1F600, 0x1F640)))
    return "".join(chr(rng.randint(start, end)) for _ in range(rng.randint(1, 3)))


def cased(word: str, rng: random.Random) -> str:
    """The word, now and then capitalised or in capitals."""
    roll = rng.random()
    if roll < 0.12:
        return word.capitalize()
    if roll < 0.2:
        return word.upper()
    return word


def figure(rng: random.Random) -> str:
    """A number as it is written in ordinary text: a time, a price, a date, a version, a share."""
    a, b, c = (rng.randint(0, 99) for _ in range(3))
    return rng.choice((f"{a}:{b:02}", f"${a}.{b:02}", f"{a}%", f"{a}/{b}/{c}", f"v{a}.{b}.{c}", f"{a},{b}", f"#{a}{b}"))


WORD_KINDS: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: cased(rng.choice(WORDS), rng),
    lambda rng: cased(rng.choice(WORDS), rng),
    lambda rng: cased(nonsense_word(rng), rng),
    lambda rng: cased(letters(rng), rng),
    number,
    number,
    identifier,
    foreign,
    figure,
    lambda rng: rng.choice(SYMBOLS),
    lambda rng: rng.choice(rng.choice((NAMES, CITIES))),
    lambda rng: "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(2, 8))),
)


def mixed(rng: random.Random, size: int) -> str:
    """Words of every kind, some with punctuation behind them."""
    return " ".join(
        rng.choice(WORD_KINDS)(rng) + rng.choice(("",) * 8 + (",", ".", "!", "?", ";")) for _ in range(size)
    )


def one_kind(rng: random.Random, size: int) -> str:
    """Words of one kind only."""
    kind = rng.choice(WORD_KINDS)
    return " ".join(kind(rng) for _ in range(size))


def alike(rng: random.Random, size: int) -> str:
    """A letter and a number by turns, as in `w17 x 204 w3`."""
    stems = rng.choices(string.ascii_lowercase, k=rng.randint(1, 4))
    joint = rng.choice(("", "", " ", "-"))
    return " ".join(rng.choice(stems) + joint + number(rng) for _ in range(max(1, size // 2)))


def few_words(rng: random.Random, size: int) -> str:
    """A random order of two to eight words, each of which comes up many times."""
    pool = [rng.choice(WORD_KINDS)(rng) for _ in range(rng.randint(2, 8))]
    return " ".join(rng.choices(pool, k=size))


def digit_run(rng: random.Random, size: int) -> str:
    """Digits in one run or in groups."""
    digits = "".join(rng.choices(string.digits, k=size))
    if rng.random() < 0.5:
        return digits
    group = rng.randint(1, 5)
    return " ".join(digits[start : start + group] for start in range(0, size, group))


def sentence(rng: random.Random, size: int) -> str:
    """Common words that begin with a capital and end with a full stop."""
    text = " ".join(rng.choices(WORDS, k=size))
    return text[0].upper() + text[1:] + rng.choice((".", ".", "!", "?", ""))


def code(rng: random.Random, size: int) -> str:
    """Something that looks like code or a path."""
    joints = rng.choices(("/", ".", "_", "(", ") ", " = ", "::", "-", ", ", '": "', " + ", "&"), k=size)
    return "".join(rng.choice((letters, identifier, nonsense_word, number))(rng) + joint for joint in joints).strip()


LineKind = Callable[[random.Random, int], str]
LINE_KINDS: dict[LineKind, float] = {
    mixed: 4.0,
    one_kind: 3.0,
    alike: 2.0,
    few_words: 1.2,
    digit_run: 1.0,
    sentence: 2.0,
    code: 1.0,
}


def line(rng: random.Random, longest_tokens: int, kinds: dict[LineKind, float] = LINE_KINDS) -> str:
    """One line without line breaks or outer blanks, of at most about `longest_tokens` tokens."""
    make = rng.choices(list(kinds), list(kinds.values()))[0]
    budget = max(1, round(longest_tokens * rng.random() ** 0.6))
    return clip(make(rng, budget), budget)


def clip(text: str, longest_tokens: int) -> str:
    """As many whole words as fit into an estimated number of tokens, but at least a few characters."""
    kept: list[str] = []
    cost = 0.0
    for word in text.split():
        cost += estimated_tokens(word)
        if kept and cost > longest_tokens:
            break
        kept.append(word)
    return " ".join(kept)


def estimated_tokens(word: str) -> float:
    """About how many tokens a word takes: runs of ASCII letters are cheap, all else is not."""
    plain = sum(char in string.ascii_letters for char in word)
    return 0.6 + 0.35 * plain + sum(0.9 if char.isascii() else 1.8 for char in word if char not in string.ascii_letters)
