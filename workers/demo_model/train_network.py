"""The demo model in PyTorch, a small Llama whose weights carry the Hugging Face names. Used by `train` only."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Shape:
    """The sizes, named as in a Hugging Face Llama config."""

    vocab_size: int = 1024
    hidden_size: int = 192
    num_hidden_layers: int = 5
    num_attention_heads: int = 6
    num_key_value_heads: int = 3
    head_dim: int = 32
    intermediate_size: int = 432
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        keys = shape.num_key_value_heads * shape.head_dim
        queries = shape.num_attention_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """`[rows, tokens, hidden]` to the same."""
        rows, tokens, _ = x.shape
        split = (rows, tokens, -1, self.shape.head_dim)
        q = rotated(self.q_proj(x).view(split).transpose(1, 2), turns)
        k = rotated(self.k_proj(x).view(split).transpose(1, 2), turns)
        v = self.v_proj(x).view(split).transpose(1, 2)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, tokens, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, tokens, hidden]` to the same."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """`[rows, tokens, hidden]` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), turns)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The whole network with tied embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        cos, sin = turns_of(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(init_weight)
        for layer in self.layers:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                nn.init.normal_(last.weight, std=0.02 / (2 * shape.num_hidden_layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[rows, tokens]` to the last hidden states `[rows, tokens, hidden]`."""
        x = self.embed_tokens(tokens)
        turns = (self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x, turns)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, hidden]` to `[n, vocabulary]`."""
        return functional.linear(hidden, self.embed_tokens.weight)


def init_weight(module: nn.Module) -> None:
    """Normal weights of deviation 0.02."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def turns_of(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, `[positions, head_dim]`, halves side by side as in Hugging Face's Llama."""
    exponents = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    angles = torch.outer(torch.arange(shape.max_position_embeddings).float(), shape.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on `[rows, heads, tokens, head_dim]`."""
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def save_weights(weights: dict[str, Tensor], shape: Shape, end_of_turn: int, padding: int, folder: Path) -> None:
    """Write model.safetensors in float32, config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"model.{name}": tensor.float().contiguous().clone() for name, tensor in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokens = {"bos_token_id": None, "eos_token_id": end_of_turn, "pad_token_id": padding}
    fixed = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
    }
    sizes = {
        **fixed,
        **asdict(shape),
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **tokens,
    }
    (folder / "config.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    generation = {"eos_token_id": [end_of_turn, padding], "pad_token_id": padding, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
