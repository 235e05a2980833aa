"""Training rows: conversations drawn without end, tokenized and packed. Used by `train` only.

Conversations that share a row are parted by `<|endoftext|>`. A label is the next token, or -100 where nothing is
learned.
"""

import random
from dataclasses import dataclass, field, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .exchanges import Limits
from .rendering import pieces
from .world import DEFAULT_MIX, Conversation, Recipe, conversation

IGNORED = -100


@dataclass(frozen=True)
class Stage:
    """What is drawn until `until`, a share of the training: the share of each row length, and the longest lines."""

    until: float
    row_shares: dict[int, float]
    line_tokens: int
    mix: dict[str, float] = field(default_factory=dict)


STAGES = (
    Stage(0.06, {128: 1.0}, 14, {"repeat": 14.0}),
    Stage(0.14, {128: 0.7, 256: 0.3}, 24, {"repeat": 14.0}),
    Stage(0.25, {128: 0.4, 256: 0.5, 512: 0.1}, 40),
    Stage(0.80, {128: 0.1, 256: 0.55, 512: 0.3, 1024: 0.05}, 64),
    Stage(1.00, {128: 0.1, 256: 0.5, 512: 0.3, 1024: 0.1}, 66),
)
LONGEST_COUNT = {128: 18, 256: 45, 512: 100, 1024: 220, 2048: 440}


def stage_at(progress: float) -> Stage:
    """The stage of the curriculum."""
    return next((stage for stage in STAGES if progress <= stage.until), STAGES[-1])


def encoded(tokenizer: Tokenizer, drawn: Conversation) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them are learned."""
    ids: list[int] = []
    learned: list[bool] = []
    for piece in pieces(drawn):
        tokens = tokenizer.encode(piece.text, add_special_tokens=False).ids
        ids += tokens
        learned += [piece.learned] * len(tokens)
    return ids, learned


class RowSource:
    """Draws packed rows. Owns its random generator."""

    def __init__(self, tokenizer: Tokenizer, seed: int, tokens_per_batch: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.tokens_per_batch = tokens_per_batch
        self.separator = tokenizer.token_to_id("<|endoftext|>")

    def batch(self, progress: float) -> tuple[Tensor, Tensor]:
        """Tokens and labels, both `[rows, length]`; rows × length is about `tokens_per_batch`."""
        stage = stage_at(progress)
        length = self.rng.choices(list(stage.row_shares), list(stage.row_shares.values()))[0]
        limits = Limits(line_tokens=stage.line_tokens, count_span=LONGEST_COUNT[length])
        mix = DEFAULT_MIX | stage.mix
        if length >= 256:
            mix = mix | {"count": 1.5 * mix["count"], "tool": 2 * mix["tool"]}
        recipe = replace(Recipe(), mix=mix, limits=limits, long_system_share=0.0 if length < 256 else 0.05)
        rows = [self.row(recipe, length) for _ in range(self.tokens_per_batch // length)]
        return torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])

    def row(self, recipe: Recipe, length: int) -> tuple[list[int], list[int]]:
        """One row: whole conversations until the next does not fit, then padding."""
        ids: list[int] = []
        learned: list[bool] = []
        misses = 0
        while misses < 3 and len(ids) < length - 12:
            turns = self.rng.choice((1, 1, 2, 3)) if length < 512 else self.rng.choice((1, 1, 2, 4, 8))
            more, flags = encoded(self.tokenizer, conversation(self.rng, recipe, turns))
            if len(ids) + len(more) > length:
                misses += 1
                continue
            ids += [*more, self.separator]
            learned += [*flags, False]
        padding = length + 1 - len(ids)
        ids += [self.separator] * padding
        learned += [False] * padding
        labels = [token if flag else IGNORED for token, flag in zip(ids[1:], learned[1:], strict=True)]
        return ids[:length], labels[:length]
