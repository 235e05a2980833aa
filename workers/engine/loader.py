"""Loads weights and tokenizer with mlx_lm, on the engine thread. Code that comes with a model is never run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from scheduler.errors import StartupError
from scheduler.telemetry import get_logger
from workers.engine.model_files import name_of, one_line, read_json

_log = get_logger(__name__)

_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions", "seq_length", "n_ctx")
# Models without a stated limit (state-space ones) get the default; nobody gets more than the largest.
_DEFAULT_CONTEXT_TOKENS, _LARGEST_CONTEXT_TOKENS = 32_768, 1 << 20


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory; `name` is what clients ask for, `vocab_size` the width of its logits."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    name: str
    path: Path
    context_tokens: int
    vocab_size: int
    eos_ids: frozenset[int]
    dtype: mx.Dtype
    config: dict[str, Any]


def load(path: Path, ref: str) -> LoadedModel:
    """Read weights and tokenizer into memory; raises StartupError where mlx_lm cannot."""
    config = read_json(path / "config.json")
    _refuse_remote_code(config, ref)
    try:
        model, tokenizer, config = mlx_lm.load(  # pyright: ignore[reportAssignmentType]
            str(path), tokenizer_config={"trust_remote_code": False}, return_config=True, trust_remote_code=False
        )
    except (ValueError, LookupError, TypeError, RuntimeError, OSError, ImportError, AttributeError) as error:
        raise StartupError(f"Model {ref!r} cannot be loaded from {path}: {one_line(error)}") from error
    _settle_tokenizer(tokenizer)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name_of(ref, path),
        path=path,
        context_tokens=_context_tokens(config, tokenizer),
        vocab_size=_vocab_size(config, tokenizer),
        eos_ids=frozenset(tokenizer.eos_token_ids),
        dtype=_dtype(model),
        config=config,
    )


def _refuse_remote_code(config: dict[str, Any], ref: str) -> None:
    if config.get("model_file") is not None:
        raise StartupError(
            f"Model {ref!r} needs Python code of its own ({config['model_file']}); Spillway does not run such code."
        )


def _settle_tokenizer(tokenizer: Any) -> None:
    """First use on this thread: the tokenizer drops truncation and padding of its file, and never changes after."""
    tokenizer.encode("settle", add_special_tokens=False)


def _context_tokens(config: dict[str, Any], tokenizer: Any) -> int:
    sources = (config, config.get("text_config") or {})
    stated = [source[key] for source in sources for key in _CONTEXT_KEYS if isinstance(source.get(key), int)]
    if stated:
        return min(stated[0], _LARGEST_CONTEXT_TOKENS)
    declared = getattr(tokenizer, "model_max_length", None)
    if isinstance(declared, int) and 0 < declared <= _LARGEST_CONTEXT_TOKENS:
        return declared
    _log.warning("the model states no context length", assumed_tokens=_DEFAULT_CONTEXT_TOKENS)
    return _DEFAULT_CONTEXT_TOKENS


def _vocab_size(config: dict[str, Any], tokenizer: Any) -> int:
    stated = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return stated if isinstance(stated, int) else len(tokenizer)


def _dtype(model: nn.Module) -> mx.Dtype:
    """The type that activations have: that of the floating weights (of the scales, in a quantised model)."""
    for _, weight in tree_flatten(model.parameters()):
        if isinstance(weight, mx.array) and mx.issubdtype(weight.dtype, mx.floating):
            return weight.dtype
    return mx.float32
