"""Llama from scratch: the model, and nothing about files (those are in support/checkpoint.py).

    ids -> embedding -> [ RMSNorm, attention with RoPE, RMSNorm, SwiGLU ] x num_hidden_layers -> RMSNorm -> lm_head

The modules carry Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`) and its rotate-half RoPE, so loading a
checkpoint is `load_state_dict`: no renaming table, no permutation.

    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    model = Llama(config)
    model(torch.tensor([[1, 2, 3]]))             # logits, (1, 3, 300)
    model.generate(torch.tensor([[1, 2, 3]]), 20)

Covers the `model_type`s llama (Llama 1 to 3.3, TinyLlama, SmolLM2), mistral, qwen2 (Qwen2, Qwen2.5), qwen3 and smollm3.
Sources: Touvron et al. 2023 (Llama 2), Zhang & Sennrich 2019 (RMSNorm), Su et al. 2021 (RoPE), Ainslie et al. 2023
(grouped-query attention), Shazeer 2020 (SwiGLU).
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class LlamaConfig:
    """What determines the model's results: the first ten fields are named as in `config.json`; `read_config` derives
    the others from it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of the SwiGLU
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048  # the context, in tokens
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False  # lm_head shares the embedding matrix
    biases: tuple[str, ...] = ()  # names of the linear layers with a bias, such as "q_proj"
    qk_norm: bool = False  # RMSNorm on each head of q and k, before RoPE
    layers_without_rope: tuple[int, ...] = ()
    rope: dict = field(default_factory=lambda: {"rope_theta": 10000.0})  # and rope_type, and the numbers of the scaling
    quantization: dict | None = None  # `quantization_config` of a packed folder

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


# model_type -> the keys of config.json that it reads, with the default of each that is absent, as in transformers 5
COMMON = dict(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32)
COMMON |= dict(num_attention_heads=32, num_key_value_heads=None, head_dim=None, max_position_embeddings=2048)
COMMON |= dict(rms_norm_eps=1e-6, rope_theta=10_000.0, tie_word_embeddings=False)
QWEN = COMMON | dict(vocab_size=151_936, intermediate_size=22_016, num_key_value_heads=32)
QWEN |= dict(max_position_embeddings=32_768, use_sliding_window=False, sliding_window=4096)
SMOLLM3 = dict(vocab_size=128_256, hidden_size=2048, num_hidden_layers=36, num_attention_heads=16)
SMOLLM3 |= dict(num_key_value_heads=4, max_position_embeddings=32_768, rope_theta=2e6, tie_word_embeddings=True)
SMOLLM3 |= dict(use_sliding_window=False, sliding_window=None, no_rope_layers=None, no_rope_layer_interval=4)
BIASES = dict(attention_bias=False, mlp_bias=False)
MODEL_TYPES = {
    "llama": COMMON | BIASES,
    "mistral": COMMON
    | dict(intermediate_size=14_336, num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096),
    "qwen2": QWEN,  # a bias on q, k and v
    "qwen3": QWEN | dict(head_dim=128, attention_bias=False),  # RMSNorm on each head of q and k
    "smollm3": COMMON | BIASES | SMOLLM3,  # layers without RoPE
}


# ------------------------------------------------------------------------------------------------------------- RoPE


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """(head_dim / 2,) float32: radians per position of each pair of channels; `default` and `llama3` scaling.

    `llama3` (Llama 3.1) slows down wavelengths longer than the original context by `factor`, leaves short ones alone
    and blends in between."""
    rope = config.rope
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return frequency

    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: leave as it is, 0: slow down
    return frequency * (keep + (1 - keep) / rope["factor"])


def rope_tables(config: LlamaConfig, length: int, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles of the first `length` positions, each (length, head_dim) float32; the two
    halves of a head rotate alike."""
    angles = torch.outer(torch.arange(length).float(), rope_frequencies(config)).repeat(1, 2)
    return angles.cos().to(device), angles.sin().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE. x: (batch, n_heads, length, head_dim); channel i turns with channel i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


# -------------------------------------------------------------------------------------------------------- the layers


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class KVCache:
    """Keys and values of the tokens so far, of one block, in buffers allocated once."""

    def __init__(self, config: LlamaConfig, batch: int, max_length: int, like: Tensor):
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.length = 0  # positions filled

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values: (batch, n_kv_heads, n_new, head_dim) -> all so far, (batch, n_kv_heads, length, head_dim)."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def mask(self, n_new: int) -> Tensor | None:
        """(n_new, length): which of the tokens so far each of the last n_new sees; None: all, or plain causality."""
        past = self.length - n_new
        if past and n_new > 1:  # the query at position past + i sees everything up to itself
            return torch.ones(n_new, self.length, dtype=torch.bool, device=self.keys.device).tril(past)
        return None


class Attention(nn.Module):
    """Causal grouped-query attention: `n_rep` query heads read each key/value head."""

    def __init__(self, config: LlamaConfig, use_rope: bool = True):
        super().__init__()
        self.head_dim = config.head_dim
        self.n_rep = config.num_attention_heads // config.num_key_value_heads
        self.use_rope = use_rope

        query_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias="q_proj" in config.biases)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias="k_proj" in config.biases)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias="v_proj" in config.biases)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias="o_proj" in config.biases)
        self.qkv = None  # or the first three as one layer: support/stack.py
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x: (batch, n_new, hidden_size); cos, sin: (n_new, head_dim) of the positions of x. Same shape out."""
        batch, n_new, _ = x.shape
        q, k, v = self.qkv(x) if self.qkv else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q = q.view(batch, n_new, -1, self.head_dim).transpose(1, 2)  # (batch, n_heads, n_new, head_dim)
        k = k.view(batch, n_new, -1, self.head_dim).transpose(1, 2)  # (batch, n_kv_heads, n_new, head_dim)
        v = v.view(batch, n_new, -1, self.head_dim).transpose(1, 2)  # (batch, n_kv_heads, n_new, head_dim)

        q, k = self.q_norm(q), self.k_norm(k)
        if self.use_rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if cache is not None:
            k, v = cache.append(k, v)  # (batch, n_kv_heads, past + n_new, head_dim)
            mask = cache.mask(n_new)
        is_causal = k.shape[2] == n_new  # no past

        # in float32 a GPU has no fast attention for grouped heads, only one that stores all n_heads * length^2 weights
        is_grouped = self.n_rep > 1
        if is_grouped and x.is_cuda and x.dtype == torch.float32:
            k, v = (t.repeat_interleave(self.n_rep, dim=1) for t in (k, v))
            is_grouped = False

        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped)
        return self.o_proj(y.transpose(1, 2).reshape(batch, n_new, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, width, bias="gate_proj" in config.biases)
        self.up_proj = nn.Linear(size, width, bias="up_proj" in config.biases)
        self.down_proj = nn.Linear(width, size, bias="down_proj" in config.biases)
        self.gate_up = None  # or the first two as one layer: support/stack.py

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x) if self.gate_up else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """One decoder layer, the unit that calibration works on. i: its number, since some layers have no RoPE."""

    def __init__(self, config: LlamaConfig, i: int = 0):
        super().__init__()
        self.self_attn = Attention(config, use_rope=i not in config.layers_without_rope)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x: (batch, length, hidden_size); cos, sin: (length, head_dim) of the positions of x. Same shape out."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The float linear layers inside a module by their dotted names: what gets quantized."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


# --------------------------------------------------------------------------------------------------------- the model


def most_likely(logits: Tensor) -> Tensor:
    """Greedy choice. logits: (batch, vocab_size) -> tokens (batch, 1)."""
    return logits.max(-1, keepdim=True).indices  # quicker than argmax on a CPU


class Llama(nn.Module):
    """The whole model: `model.embed_tokens`, `model.layers`, `model.norm`, `lm_head`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        ids: Tensor,
        caches: list[KVCache] | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """ids: (batch, length) int64 -> logits (batch, length, vocab_size).

        caches: one for each block, with the tokens before ids
        rope: the tables of `rope_tables`, long enough for past and new tokens; computed if not given
        last_only: logits of the last token alone, (batch, 1, vocab_size): the head is a large part of the work"""
        start = caches[0].length if caches else 0
        end = start + ids.shape[1]
        x = self.model.embed_tokens(ids).to(self.model.norm.weight.dtype)  # (batch, length, hidden_size)
        cos, sin = (t[start:end].to(x.dtype) for t in rope or rope_tables(self.config, end, ids.device))

        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, caches[i] if caches else None)

        x = x[:, -1:] if last_only else x
        # bit-planes have no weight and take any dtype
        return self.lm_head(self.model.norm(x).to(getattr(self.lm_head, "weight", x).dtype))

    @torch.inference_mode()
    def generate(
        self,
        ids: Tensor,
        n_tokens: int,
        eos_ids: tuple[int, ...] = (),
        choose: Callable[[Tensor], Tensor] = most_likely,
        make_step: Callable | None = None,
    ) -> Tensor:
        """Continuation with a KV cache. ids: (batch, length) int64 -> (batch, length + n_tokens).

        eos_ids: end-of-text tokens; fewer tokens are generated when every sequence has had one
        choose: logits (batch, vocab_size) -> the next token of each sequence, (batch, 1)
        make_step: another way to take the steps after the prompt: `fixed_step` of support/graph.py"""
        length = ids.shape[1] + n_tokens
        rope = rope_tables(self.config, length, ids.device)
        caches = [KVCache(self.config, len(ids), length, self.model.norm.weight) for _ in self.model.layers]

        eos = torch.tensor(eos_ids, dtype=torch.int64, device=ids.device)
        ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        step = partial(self, caches=caches, rope=rope, last_only=True)
        new = ids  # first the prompt, then one token at a time
        for i in range(n_tokens):
            if i == 1 and make_step is not None:
                step = make_step(self, caches, rope)
            new = choose(step(new)[:, -1])  # (batch, 1)
            ids = torch.cat((ids, new), dim=1)
            ended |= torch.isin(new, eos)
            if eos_ids and ended.all():
                break
        return ids
