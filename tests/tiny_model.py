"""A llama of random weights with a small byte-level tokenizer in Hugging Face layout: loads in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = """
{%- for message in messages -%}
{%- if message.role == 'tool' and not message.tool_call_id -%}{{- raise_exception('a tool message needs an id') -}}{%- endif -%}
<|start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>
{%- endfor -%}
<|end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant
{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}{%- endif -%}
""".strip()  # noqa: E501
CORPUS = ["the quick brown fox jumps over the lazy dog", "one two three four five", "Zürich, 東京, 🌊 and a café"]


def write_tiny_model(directory: Path, *, context_tokens: int = 512, template: str | None = TEMPLATE) -> Path:
    """Write the model into `directory` (made if need be) and return it; the same call gives the same weights."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(directory, template)
    config = _config(vocab_size, context_tokens)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    mx.random.seed(7)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    # Wider than a trained model's weights, so that the most likely token depends on what was said.
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # pyright: ignore[reportAssignmentType]
    weights = {name: array * 4 if array.ndim == 2 else array for name, array in parameters}
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    return directory


def _config(vocab_size: int, context_tokens: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": vocab_size,
        "max_position_embeddings": context_tokens,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    }


def write_tokenizer(directory: Path, template: str | None = TEMPLATE) -> int:
    """Write the tokenizer's files into the directory; returns the number of its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in ("<|start|>", "<|end|>", "<|pad|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return tokenizer.get_vocab_size()
