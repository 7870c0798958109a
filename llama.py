"""Llama from scratch, reading and writing Hugging Face checkpoint folders.

The modules carry Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`) and its rotate-half RoPE, so
loading is `load_state_dict`: no renaming table, no permutation. A folder holds `config.json`, `tokenizer.json` and
either `model.safetensors` or shards with `model.safetensors.index.json`. A file is memory-mapped while a tensor is
read, and `Checkpoint` builds one module at a time, so a 70B model can be walked through block by block:

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
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kernel import BCQLinear


KINDS = {int: "a whole number, 1 to 2^30", float: "a number above 0", bool: "true or false"}  # of settings


def setting(raw: dict, key: str, kind: type, default=None):
    """raw[key], or `default` if it is absent or null. Raises ValueError if it is not of this kind."""
    value = raw.get(key)
    if value is None and default is not None:
        return default
    fits = isinstance(value, (int, float) if kind is float else kind)
    if kind is not bool:
        fits = fits and not isinstance(value, bool) and 0 < value < (2**30 + 1 if kind is int else math.inf)
    if not fits:
        raise ValueError(f"{key} is {value!r:.60}: must be {KINDS[kind]}")
    return value


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
            raise ValueError(
                f"model_type {raw.get('model_type')!r:.60} is not supported: only 'llama' and 'mistral' are"
            )
        for key in ("attention_bias", "mlp_bias"):
            if raw.get(key):
                raise ValueError(f"{key} is set: linear layers with a bias are not supported")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {raw['hidden_act']!r:.60} is not supported: only 'silu' is")
        numbers = {
            f.name: setting(raw, f.name, f.type, None if f.default is MISSING else f.default)
            for f in fields(cls)
            if f.type in KINDS
        }
        config = cls(**numbers)
        config.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
        config.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if heads % kv_heads or size % 2 or not 0 < heads * size < 2**30:
            raise ValueError(f"{heads} attention heads of size {size} do not go with {kv_heads} key/value heads")
        # Mistral 0.1: inside its window, sliding attention is plain attention
        window = setting(raw, "sliding_window", int, config.max_position_embeddings)
        config.max_position_embeddings = min(config.max_position_embeddings, window)
        config.rope = {"rope_theta": raw.get("rope_theta", 10000.0)} | nested(raw, "rope_scaling", "rope_parameters")
        check_rope(config.rope)
        config.quantization = nested(raw, "quantization_config") or None
        if config.quantization:
            method = config.quantization.get("quant_method")
            if method != "flexbcq":
                raise ValueError(f"quant_method {method!r:.60} is not supported: only 'flexbcq' is")
            setting(config.quantization, "bits", int)
            if config.quantization.get("group_size") != -1:
                setting(config.quantization, "group_size", int)
        return config


def nested(raw: dict, *keys: str) -> dict:
    """The first of these that is set, or {}. Raises ValueError if it is not a JSON object."""
    for key in keys:
        if raw.get(key) and not isinstance(raw[key], dict):
            raise ValueError(f"{key} is {raw[key]!r:.60}: must be a JSON object")
    return next((raw[key] for key in keys if raw.get(key)), {})


def check_rope(rope: dict) -> None:
    """Raises ValueError naming what `rope_frequencies` could not work with."""
    setting(rope, "rope_theta", float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind!r:.60} is not supported: only 'default' and 'llama3' are")
    if kind == "llama3":
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            setting(rope, key, float)
        if rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise ValueError("low_freq_factor is not below high_freq_factor")


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """(head_dim / 2,) float32: radians per position of each pair of channels; `default` and `llama3` scaling.

    `llama3` (Llama 3.1) slows wavelengths longer than the original context down by `factor`, leaves short ones alone
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
        q, k = rotate(torch.cat((q, k), dim=1), cos, sin).split((q.shape[1], k.shape[1]), dim=1)
        if cache is not None:
            k, v = cache.append(k, v)
        past, mask = k.shape[2] - new, None
        if past and new > 1:  # query i stands at position past + i and sees everything up to itself
            mask = torch.ones(new, past + new, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not past, enable_gqa=self.n_rep > 1)
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

    def forward(
        self, ids: Tensor, caches: list[KVCache] | None = None, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """ids: (batch, length) int64 -> logits (batch, length, vocab_size).

        rope: of `rope_tables`, long enough for what the caches hold and ids; computed if not given"""
        start = caches[0].length if caches else 0
        end = start + ids.shape[1]
        x = self.model.embed_tokens(ids).to(self.model.norm.weight.dtype)
        cos, sin = (t[start:end].to(x.dtype) for t in rope or rope_tables(self.config, end, ids.device))
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, caches[i] if caches else None)
        return self.lm_head(self.model.norm(x).to(self.lm_head.weight.dtype))

    @torch.inference_mode()
    def generate(self, ids: Tensor, n_tokens: int) -> Tensor:
        """Greedy continuation with a KV cache. ids: (batch, length) int64 -> (batch, length + n_tokens)."""
        length, like = ids.shape[1] + n_tokens, self.model.norm.weight
        caches = [KVCache(self.config, ids.shape[0], length, like) for _ in self.model.layers]
        new, rope = ids, rope_tables(self.config, length, ids.device)
        for _ in range(n_tokens):
            logits = self(new, caches, rope)[:, -1]
            new = logits.max(-1, keepdim=True).indices  # (batch, 1); quicker than argmax on a CPU
            ids = torch.cat((ids, new), dim=1)
        return ids


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The float linear layers inside a module by their dotted names: what gets quantized."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def open_tensors(path: Path) -> safe_open:
    """A safetensors file, to be used in a `with`. Raises OSError if it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path}: missing or damaged ({error}); download it again") from None


STORED = {  # dtype of a module's tensor -> what it may be in a file
    torch.float32: ("F32", "BF16", "F16", "F64"),
    torch.float16: ("F16",),
    torch.int32: ("I32",),
}


class Checkpoint:
    """A Hugging Face folder; tensors are memory-mapped when asked for. Raises OSError or ValueError with one line
    naming file or tensor. Name, dtype and shape of every tensor are checked here, before anything is computed; one that
    the model has no place for is an error too, since it means another model."""

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
        except ValueError as error:
            raise ValueError(f"{self.folder / 'config.json'}: {error}") from None
        self._stored = self._read_headers()
        self.tied = self.config.tie_word_embeddings and "lm_head.weight" not in self._stored
        self._check()

    def _json(self, name: str) -> dict:
        try:
            content = json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            raise OSError(f"{self.folder}: no {name} in this folder; is it a Hugging Face checkpoint?") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.folder / name}: not JSON ({error}); download it again") from None
        if not isinstance(content, dict):
            raise ValueError(f"{self.folder / name}: not a JSON object; download it again")
        return content

    def shards(self) -> list[Path]:
        """The weight files: `model.safetensors`, or those the index names."""
        single, index = self.folder / "model.safetensors", "model.safetensors.index.json"
        if single.exists():
            return [single]
        try:
            names = sorted(set(self._json(index)["weight_map"].values()))
            outside = [name for name in names if name != Path(name).name]
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"{self.folder / index}: no weight_map from tensors to files; download it again") from None
        if outside:
            raise ValueError(f"{self.folder / index}: {outside[0]!r:.60} is not a file name; download it again")
        return [self.folder / name for name in names]

    def file_size(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.shards())

    def _read_headers(self) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
        """Of every tensor by name: its file, dtype and shape."""
        stored = {}
        for path in self.shards():
            with open_tensors(path) as file:
                for name in file.keys():
                    if name in stored:
                        raise ValueError(f"{path}: {name} is also in {stored[name][0].name}; delete the wrong file")
                    part = file.get_slice(name)
                    stored[name] = path, part.get_dtype(), tuple(part.get_shape())
        return stored

    def _check(self) -> None:
        """Raises ValueError naming a tensor that is absent, or not what config.json says."""
        for i in range(self.config.num_hidden_layers):  # before a module is built for each of them
            self._found(f"model.layers.{i}.input_layernorm.weight")
        if not self.config.quantization and any(name.endswith(".bit_planes") for name in self._stored):
            raise ValueError(f"{self.folder}: holds bit-planes, but config.json has no quantization_config")
        with torch.device("meta"):
            expected = self._with_planes(Llama(self.config), "").state_dict()
        if self.tied:
            del expected["lm_head.weight"]
        for name, t in expected.items():
            _, dtype, shape = self._found(name)
            if shape != t.shape:
                raise ValueError(f"{self.folder}: {name} has shape {shape}, config.json says {tuple(t.shape)}")
            if dtype not in STORED[t.dtype]:
                raise ValueError(f"{self.folder}: {name} is {dtype}, supported is {' or '.join(STORED[t.dtype])}")
        for name in sorted(self._stored.keys() - expected.keys()):
            if not name.endswith("rotary_emb.inv_freq"):  # of early Llamas: computed anew
                raise ValueError(f"{self.folder}: tensor {name} has no place in the model that config.json describes")

    def _found(self, name: str) -> tuple[Path, str, tuple[int, ...]]:
        if name not in self._stored:
            raise ValueError(f"{self.folder}: tensor {name} is in none of the files; download the checkpoint again")
        return self._stored[name]

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored dtype. Raises ValueError if it is not finite.

        Its file is opened for it alone: what stays mapped counts as memory of the process."""
        with open_tensors(self._found(name)[0]) as file:
            tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{self.folder}: {name} contains NaN or infinity; download the checkpoint again")
        return tensor

    def tensors(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """All tensors whose name is wanted, as they are in the files."""
        return {name: self.tensor(name) for name in self._stored if wanted(name)}

    def n_bytes(self, wanted: Callable[[str], bool]) -> int:
        """Bytes that these tensors take in the files."""
        sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4}
        return sum(
            math.prod(shape) * sizes.get(dtype, 0) for name, (_, dtype, shape) in self._stored.items() if wanted(name)
        )

    def _with_planes(self, module: nn.Module, prefix: str) -> nn.Module:
        """Put an empty `BCQLinear` wherever the files hold bit-planes."""
        for name, linear in linears(module).items():
            if f"{prefix}{name}.bit_planes" in self._stored:
                bits, group_size = self.config.quantization["bits"], self.config.quantization["group_size"]
                try:
                    packed = BCQLinear(linear.in_features, linear.out_features, bits, group_size)
                except ValueError as error:
                    raise ValueError(f"{self.folder / 'config.json'}: {prefix}{name}: {error}") from None
                module.set_submodule(name, packed)
        return module

    def _fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, device) -> nn.Module:
        """Load a module that was built on the meta device."""
        self._with_planes(module, prefix)
        state = {name: self.tensor(prefix + name) for name in module.state_dict()}
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

    def check_ids(self, ids: Tensor) -> Tensor:
        """Raises ValueError if there are tokens the model does not know."""
        if ids.numel() and ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"{self.folder / 'tokenizer.json'}: gives token {ids.max()}, config.json says vocab_size "
                f"{self.config.vocab_size}; they belong to different models"
            )
        return ids

    def embed(self, ids: Tensor) -> Tensor:
        """ids: (...) int64 -> embeddings (..., hidden_size) float32, without a float32 copy of the whole table."""
        return F.embedding(self.check_ids(ids), self.tensor("model.embed_tokens.weight")).float()

    def head(self, dtype=torch.float32, device="cpu") -> nn.Sequential:
        """The final norm and lm_head: (..., hidden_size) -> logits (..., vocab_size)."""
        with torch.device("meta"):
            norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
            lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self._fill(norm, "model.norm.", dtype, device)
        self._fill(lm_head, "model.embed_tokens." if self.tied else "lm_head.", dtype, device)
        return nn.Sequential(norm, lm_head)

    def model(self, dtype=torch.float32, device="cpu", head_dtype: torch.dtype | None = None) -> Llama:
        """The whole model; embedding and lm_head may have a dtype of their own."""
        with torch.device("meta"):
            model = Llama(self.config)
        model.model.embed_tokens = self.embedding(head_dtype or dtype, device)
        model.model.layers = nn.ModuleList(self.block(i, dtype, device) for i in range(self.config.num_hidden_layers))
        model.model.norm, lm_head = self.head(dtype, device)
        model.lm_head = lm_head.to(head_dtype or dtype)
        if self.tied:
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


def write_json(path: Path, content: dict) -> None:
    """Write one JSON file, indented."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def side_files(folder: Path) -> list[Path]:
    """What belongs to a model besides config and weights: tokenizer, generation settings."""
    files = [f for f in folder.iterdir() if f.suffix in (".json", ".model", ".jinja", ".txt") and f.is_file()]
    return [f for f in files if f.name not in ("config.json", "calibration.json") and "safetensors" not in f.name]


def write_config(folder: Path, config: dict, source: Path | None = None) -> None:
    """Write `config.json` and, with `source`, copy its side files."""
    write_json(folder / "config.json", config)
    for file in side_files(source) if source else ():
        with whole_file(folder / file.name) as temporary:
            shutil.copy(file, temporary)


def write_index(folder: Path) -> None:
    """Write `model.safetensors.index.json` for all shards in the folder."""
    shards = sorted(folder.glob("model-*.safetensors"))
    weight_map = {name: path.name for path in shards for name in safe_open(path, framework="pt").keys()}
    index = {"metadata": {"total_size": sum(path.stat().st_size for path in shards)}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
