"""Makes the byte-level BPE tokenizer from the world's own text: python -m workers.demo_model.train_tokenizer

Digits stand alone, so that counting and adding see every digit; any UTF-8 text comes back as it was.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from . import weights_path
from .rendering import pieces
from .vocabulary import CITIES, NAMES, WORDS
from .world import Recipe, conversation

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}|, (?=\p{N})| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def corpus(conversations: int) -> Iterator[str]:
    """Conversations of every skill, and each known word with and without a blank before it."""
    rng = random.Random(1)
    for _ in range(conversations):
        yield "".join(piece.text for piece in pieces(conversation(rng, Recipe(), rng.randint(1, 3))))
    for _ in range(40):
        yield " ".join(WORDS + NAMES + CITIES)


def train(vocabulary: int, conversations: int) -> Tokenizer:
    """Learn the merges; the template's tokens come first, then the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trainer.vocab_size = vocabulary - len(MARKERS)
    tokenizer.train_from_iterator(corpus(conversations), trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, and its configuration with the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--conversations", type=int, default=20000)
    parser.add_argument("--out", type=Path, default=weights_path())
    options = parser.parse_args()
    save(train(options.vocabulary, options.conversations), options.out)


if __name__ == "__main__":
    main()
