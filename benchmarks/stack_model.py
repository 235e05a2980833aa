"""A llama with random weights as a directory that every server of the stack benchmark can load."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import ModelArgs
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from benchmarks.engine_turns import new_model
from workers.demo_model import weights_path

_CONTEXT_TOKENS = 8192
_CHAT_TEMPLATE = (  # no tools and no thinking, about which servers differ
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LIVELINESS = 2.0  # times the usual weights; with those it says one token for ever


def write_model(name: str, folder: Path) -> TokenizerWrapper:
    """Write model `tiny` or `small` with the demo model's tokenizer and a plain chat template; returns the tokenizer.

    Tokens without printable text of their own, the end of the text first among them, have embeddings of zero and so
    logits of zero (the embeddings are tied): greedily they are never said. No server ends early, none holds text back.
    """
    tokenizer = load_tokenizer(weights_path())
    model = new_model(name, vocab_size=len(tokenizer.vocab)).model
    said = mx.array([_is_plain(tokenizer, token) for token in range(len(tokenizer.vocab))], dtype=mx.float32)
    weights = {
        key: _LIVELINESS * value if value.ndim == 2 else value
        for key, value in tree_flatten(model.parameters())
        if isinstance(value, mx.array)
    }
    weights["model.embed_tokens.weight"] *= said[:, None]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    arguments = dataclasses.asdict(cast(ModelArgs, model.args))
    config = {key: value for key, value in arguments.items() if value is not None}
    config |= {"max_position_embeddings": _CONTEXT_TOKENS, "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    about = json.loads((weights_path() / "tokenizer_config.json").read_text())
    about |= {"chat_template": _CHAT_TEMPLATE, "model_max_length": _CONTEXT_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
    shutil.copy(weights_path() / "tokenizer.json", folder / "tokenizer.json")
    return load_tokenizer(folder)


def _is_plain(tokenizer: TokenizerWrapper, token: int) -> bool:
    text = tokenizer.decode([token])
    return token not in tokenizer.all_special_ids and text.isascii() and text.isprintable() and "<" not in text
