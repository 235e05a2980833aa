"""Small fp32 models of random weights, one per cache kind, made from mlx_lm's own model classes.

Each is written to a directory as a published model is (config, tokenizer, safetensors) and comes back through the
product's loader. Sliding windows and chunks are shorter than the tests' prompts, so that all of them are outgrown.
"""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from tests.tiny_model import write_tokenizer
from workers.engine.loader import LoadedModel, load

VOCAB = 320
CONTEXT_TOKENS = 1024
WINDOW = 24

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 24,
    "mamba_d_ssm": 96,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
_YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 4,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 256,
}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
_GEMMA3N: dict[str, Any] = {
    "model_type": "gemma3n_text",
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB,
    "sliding_window": WINDOW,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "hidden_size_per_layer_input": 16,
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
}
_LLAMA4: dict[str, Any] = {
    "model_type": "llama4_text",
    "attention_bias": False,
    "attention_chunk_size": WINDOW,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 4,
    "num_experts_per_tok": 1,
    "num_local_experts": 2,
    "rope_scaling": None,
    "use_qk_norm": True,
}

_ECHOING = ("gemma2", "gemma3n")  # their large embeddings drown what the layers add
_LFM2: dict[str, Any] = {
    "num_hidden_layers": 3,
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 48,
    "block_ff_dim": 64,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
}
_WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}  # a multiple of the group that weights are quantised in

# Name of the zoo's model: model_type and what its configuration adds to the shared one.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3_moe": ("qwen3_moe", _MOE),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 12}),
    "deepseek_v2": ("deepseek_v2", {**_MLA, "topk_method": "greedy", "rope_scaling": _YARN}),
    "deepseek_v3": ("deepseek_v3", _MLA),
    "deepseek_v32": ("deepseek_v32", {**_MLA, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 16}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 12},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": {"rope_type": "default"},
        },
    ),
    "gemma3n": ("gemma3n", {"text_config": {**_SHARED, **_GEMMA3N}}),
    "gemma4": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "global_head_dim": 12,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 2,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "llama4": ("llama4", {"text_config": {**_SHARED, **_LLAMA4}}),
    "mamba2": (
        "mamba2",
        {
            "num_heads": 4,
            "head_dim": 24,
            "state_size": 8,
            "conv_kernel": 4,
            "n_groups": 1,
            "use_bias": False,
            "use_conv_bias": True,
            "layer_norm_epsilon": 1e-5,
            "time_step_limit": [0.0, 100.0],
            "time_step_rank": "auto",
            "intermediate_size": 96,
        },
    ),
    "lfm2": ("lfm2", _LFM2),
    "falcon_h1": ("falcon_h1", _MAMBA),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_MAMBA,
            "attention_bias": False,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 0.3,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **_MOE,
            "num_hidden_layers": 3,
            "full_attention_interval": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,  # the Metal kernel's smallest
            "linear_value_head_dim": 12,
            "linear_conv_kernel_dim": 4,
            "shared_expert_intermediate_size": 32,
            "partial_rotary_factor": 0.5,
        },
    ),
}
MODELS = tuple(_MODELS)
_MODELS["wide-llama"] = ("llama", _WIDE)
_MODELS["wide-lfm2"] = ("lfm2", {**_LFM2, **_WIDE, "block_dim": 64})


@cache
def zoo_model(name: str, bits: int | None = None) -> LoadedModel:
    """The model, written to disk and loaded once per test run; `bits` quantises its weights in groups of 32."""
    directory = Path(mkdtemp(prefix="spillway-zoo-"))
    label = name if bits is None else f"{name}-{bits}bit"
    return load(_write(directory / label, name, bits), str(directory / label))


def _write(directory: Path, name: str, bits: int | None) -> Path:
    directory.mkdir(parents=True)
    write_tokenizer(directory)
    model_type, changes = _MODELS[name]
    config = {"model_type": model_type, **_SHARED, **changes}
    mx.random.seed(11)
    model = _random_model(model_type, config)
    if bits is not None:
        model, config = quantize_model(model, config, group_size=32, bits=bits)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    weights: dict[str, Any] = dict(tree_flatten(model.parameters()))  # pyright: ignore[reportArgumentType]
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    return directory


def _random_model(model_type: str, config: dict[str, Any]) -> nn.Module:
    """Wider than trained weights, and a weak echo of the last token: what comes next depends on all that was said."""
    classes = importlib.import_module(f"mlx_lm.models.{model_type}")
    model = classes.Model(classes.ModelArgs.from_dict(config))
    model.apply(lambda weight: weight * 2 if weight.ndim >= 2 else weight)
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # pyright: ignore[reportAssignmentType]
    for name, weight in weights:
        if name.endswith("embed_tokens.weight") and model_type in _ECHOING:
            model.load_weights([(name, weight * 0.05)], strict=False)
        if name.endswith("dt_bias"):
            model.load_weights([(name, weight - 4)], strict=False)  # a state that remembers for long
    mx.eval(model.parameters())
    return model
