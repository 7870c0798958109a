"""Llama from scratch, reading and writing Hugging Face checkpoint folders.

The modules carry Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`) and its rotate-half RoPE, so
loading is `load_state_dict`: no renaming table, no permutation. A folder holds `config.json`, `tokenizer.json` and
either `model.safetensors` or shards with `model.safetensors.index.json`. Files stay memory-mapped; `Checkpoint`
builds one module at a time, so a 70B model can be walked through block by block:

    checkpoint = Checkpoint("models/tiny")
    block = checkpoint.block(0)                  # one decoder layer, float32, on the CPU
    model = checkpoint.model()                   # all of it
    model.generate(torch.tensor([[1, 2, 3]]), 20)

In a packed folder (`calibrate.py` writes those) a linear layer is stored as bit-planes; it loads as a `BCQLinear`.

Covers Llama 1-3.2, TinyLlama, SmolLM2 (`model_type` llama) and Mistral. Sources: Touvron et al. 2023 (Llama 2),
Zhang & Sennrich 2019 (RMSNorm), Su et al. 2021 (RoPE), Ainslie et al. 2023 (GQA), Shazeer 2020 (SwiGLU).
"""

import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernel import BCQLinear


@dataclass
class LlamaConfig:
    """The fields of `config.json` that decide what the model computes, under their Hugging Face names."""

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
    rope: dict = field(default_factory=dict)  # rope_theta, rope_type and the numbers of the scaling
    quantization: dict | None = None  # `quantization_config` of a packed folder

    @classmethod
    def from_dict(cls, raw: dict) -> "LlamaConfig":
        """Check and pick the fields of a `config.json`. Raises ValueError naming the field."""
        if raw.get("model_type") not in ("llama", "mistral"):
            raise ValueError(f"model_type {raw.get('model_type')!r} is not supported: only 'llama' and 'mistral' are")
        for key in ("attention_bias", "mlp_bias"):
            if raw.get(key):
                raise ValueError(f"{key} is set: linear layers with a bias are not supported")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported: only 'silu' is")
        known = {f.name for f in fields(cls)} - {"rope", "quantization"}
        config = cls(**{key: value for key, value in raw.items() if key in known and value is not None})
        config.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
        config.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        if raw.get("sliding_window"):  # Mistral 0.1: inside its window, sliding attention is plain attention
            config.max_position_embeddings = min(config.max_position_embeddings, raw["sliding_window"])
        config.rope = {"rope_theta": raw.get("rope_theta", 10000.0)} | (
            raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        )
        config.quantization = raw.get("quantization_config")
        method = (config.quantization or {}).get("quant_method", "flexbcq")
        if method != "flexbcq":
            raise ValueError(f"quant_method {method!r} is not supported: only 'flexbcq' is")
        return config


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """(head_dim / 2,) float32: radians per position of each pair of channels; `default` and `llama3` scaling.

    `llama3` (Llama 3.1) slows wavelengths longer than the original context down by `factor`, leaves short ones alone
    and blends in between. Raises ValueError for any other kind."""
    rope = config.rope
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return frequency
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported: only 'default' and 'llama3' are")
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: leave as it is, 0: slow down
    return frequency * (keep + (1 - keep) / rope["factor"])


def rope_tables(config: LlamaConfig, length: int, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin of every rotation angle, each (length, head_dim) float32; the two halves of a head rotate alike."""
    angles = torch.outer(torch.arange(length).float(), rope_frequencies(config)).repeat(1, 2)
    return angles.cos().to(device), angles.sin().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE. x: (batch, n_heads, length, head_dim); channel i turns with channel i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, the mean of squares in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class KVCache:
    """Keys and values of the tokens so far, of one block, in buffers allocated once."""

    def __init__(self, config: LlamaConfig, batch: int, max_length: int, like: Tensor):
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        self.keys, self.values, self.length = like.new_empty(shape), like.new_empty(shape), 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values: (batch, n_kv_heads, new, head_dim) -> all so far, (batch, n_kv_heads, length, head_dim)."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Attention(nn.Module):
    """Causal grouped-query attention: `n_rep` query heads read each key/value head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.n_rep = config.num_attention_heads // config.num_key_value_heads
        query_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        batch, new, _ = x.shape
        q, k, v = (
            proj(x).view(batch, new, -1, self.head_dim).transpose(1, 2)  # (batch, n_heads, new, head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        past, mask = k.shape[2] - new, None
        if past:  # query i stands at position past + i and sees everything up to itself
            mask = torch.ones(new, past + new, dtype=torch.bool, device=x.device).tril(past)
        k, v = k.repeat_interleave(self.n_rep, dim=1), v.repeat_interleave(self.n_rep, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not past)
        return self.o_proj(y.transpose(1, 2).reshape(batch, new, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer, the unit that calibration works on."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x: (batch, length, hidden_size); cos, sin: (length, head_dim) of the positions of x. Same shape out."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The whole model: `model.embed_tokens`, `model.layers`, `model.norm`, `lm_head`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """ids: (batch, length) int64 -> logits (batch, length, vocab_size)."""
        start = caches[0].length if caches else 0
        cos, sin = rope_tables(self.config, start + ids.shape[1], ids.device)
        x = self.model.embed_tokens(ids)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos[start:], sin[start:], caches[i] if caches else None)
        return self.lm_head(self.model.norm(x))

    @torch.inference_mode()
    def generate(self, ids: Tensor, n_tokens: int) -> Tensor:
        """Greedy continuation with a KV cache. ids: (batch, length) int64 -> (batch, length + n_tokens)."""
        length, like = ids.shape[1] + n_tokens, self.model.norm.weight
        caches = [KVCache(self.config, ids.shape[0], length, like) for _ in self.model.layers]
        new = ids
        for _ in range(n_tokens):
            new = self(new, caches)[:, -1].argmax(-1, keepdim=True)  # (batch, 1)
            ids = torch.cat((ids, new), dim=1)
        return ids


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The float linear layers inside a module by their dotted names: what gets quantized."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


class Checkpoint:
    """A Hugging Face folder, memory-mapped. Raises OSError or ValueError with one line naming file or tensor."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise OSError(
                f"{folder}: no such folder; for a model on Hugging Face, first run "
                f"`hf download {folder} --local-dir FOLDER` (from `pip install huggingface_hub`) and give FOLDER"
            )
        self.raw_config = self._json("config.json")
        try:
            self.config = LlamaConfig.from_dict(self.raw_config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.folder / 'config.json'}: {error}") from None
        self._file_of = {name: file for file in self._open_shards() for name in file.keys()}

    def _json(self, name: str) -> dict:
        try:
            content = json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            raise OSError(f"{self.folder}: no {name} in this folder; is it a Hugging Face checkpoint?") from None
        except ValueError as error:
            raise ValueError(f"{self.folder / name}: not JSON ({error})") from None
        if not isinstance(content, dict):
            raise ValueError(f"{self.folder / name}: not a JSON object")
        return content

    def _open_shards(self) -> list:
        names = ["model.safetensors"]
        if not (self.folder / names[0]).exists():
            names = sorted(set(self._json("model.safetensors.index.json").get("weight_map", {}).values()))
        shards = []
        for path in (self.folder / Path(name).name for name in names):  # .name: never outside the folder
            try:
                shards.append(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise OSError(f"{path}: missing or damaged ({error}); download it again") from None
        return shards

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor in its stored dtype. Raises ValueError if it is absent, misshapen or not finite."""
        if name not in self._file_of:
            raise ValueError(f"{self.folder}: tensor {name} is in none of the files; download the checkpoint again")
        found = tuple(self._file_of[name].get_slice(name).get_shape())
        if found != tuple(shape):
            raise ValueError(f"{self.folder}: {name} has shape {found}, config.json says {tuple(shape)}")
        tensor = self._file_of[name].get_tensor(name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{self.folder}: {name} contains NaN or infinity")
        return tensor

    def tensors(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """All tensors whose name is wanted, as they are in the files (memory-mapped)."""
        return {name: file.get_tensor(name) for name, file in self._file_of.items() if wanted(name)}

    def _fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, device) -> nn.Module:
        """Load a module that was built on the meta device; linears stored as bit-planes become `BCQLinear`."""
        for name, linear in linears(module).items():
            if f"{prefix}{name}.bit_planes" in self._file_of:
                settings = self.config.quantization
                packed = BCQLinear(linear.in_features, linear.out_features, settings["bits"], settings["group_size"])
                module.set_submodule(name, packed)
        state = {name: self.tensor(prefix + name, t.shape) for name, t in module.state_dict().items()}
        # a BCQLinear keeps its int32 planes and fp16 scales, whatever dtype it multiplies with
        state = {name: t.to(dtype) if name.endswith("weight") else t for name, t in state.items()}
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False).to(device)

    def block(self, i: int, dtype=torch.float32, device="cpu") -> Block:
        """Decoder layer i."""
        with torch.device("meta"):
            block = Block(self.config)
        return self._fill(block, f"model.layers.{i}.", dtype, device)

    def embedding(self, dtype=torch.float32, device="cpu") -> nn.Embedding:
        """Token embeddings: (vocab_size, hidden_size)."""
        with torch.device("meta"):
            embedding = nn.Embedding(self.config.vocab_size, self.config.hidden_size)
        return self._fill(embedding, "model.embed_tokens.", dtype, device)

    def head(self, dtype=torch.float32, device="cpu") -> nn.Sequential:
        """The final norm and lm_head: (..., hidden_size) -> logits (..., vocab_size)."""
        with torch.device("meta"):
            norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
            lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        tied = self.config.tie_word_embeddings
        self._fill(norm, "model.norm.", dtype, device)
        self._fill(lm_head, "model.embed_tokens." if tied else "lm_head.", dtype, device)
        return nn.Sequential(norm, lm_head)

    def model(self, dtype=torch.float32, device="cpu") -> Llama:
        """The whole model."""
        with torch.device("meta"):
            model = Llama(self.config)
        model.model.embed_tokens = self.embedding(dtype, device)
        model.model.layers = nn.ModuleList(self.block(i, dtype, device) for i in range(self.config.num_hidden_layers))
        model.model.norm, model.lm_head = self.head(dtype, device)
        if self.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model


def sync(path: Path) -> None:
    """Wait until the disk holds a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name; what is written there appears under `path` whole or, on any failure, not at all.

    Raises OSError, for example when the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path.parent}: could not write {path.name} ({error}); is the disk full?") from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file."""
    with whole_file(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # the library leaves 0600


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A whole safetensors file, memory-mapped. Raises OSError if it is missing or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path}: missing or damaged ({error})") from None


def write_json(path: Path, content: dict) -> None:
    """Write one JSON file, indented."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def write_config(folder: Path, config: dict, source: Path | None = None) -> None:
    """Write `config.json` and, with `source`, copy what else belongs to a model: tokenizer, generation settings."""
    write_json(folder / "config.json", config)
    for file in source.iterdir() if source else ():
        ours = file.name == "config.json" or "safetensors" in file.name or file.name.startswith("calibration.")
        if file.suffix in (".json", ".model", ".jinja", ".txt") and not ours:
            with whole_file(folder / file.name) as temporary:
                shutil.copy(file, temporary)


def write_index(folder: Path) -> None:
    """Write `model.safetensors.index.json` for all shards in the folder."""
    shards = sorted(folder.glob("model-*.safetensors"))
    weight_map = {name: path.name for path in shards for name in safe_open(path, framework="pt").keys()}
    index = {"metadata": {"total_size": sum(path.stat().st_size for path in shards)}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
