"""Hugging Face checkpoint folders, original and packed: reading one module at a time, writing whole files.

A folder holds `config.json`, `tokenizer.json` and either `model.safetensors` or shards with
`model.safetensors.index.json`. A file is memory-mapped only while a tensor is read, and `Checkpoint` builds one module
at a time, so a 70B model can be walked through block by block:

    checkpoint = Checkpoint("models/tiny")
    block = checkpoint.block(0)                  # one decoder layer, float32, on the CPU
    model = checkpoint.model()                   # all of it

In a packed folder (`calibrate.py` writes those) a linear layer is stored as bit-planes and loads as a `BCQLinear`;
embedding and lm_head may be stored as bit-planes, too.
"""

import contextlib
import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kernel import BCQEmbedding, BCQLinear
from llama import MODEL_TYPES, Block, Llama, LlamaConfig, RMSNorm

# ------------------------------------------------------------------------------------------------------- config.json

KIND_TEXT = {int: "a whole number, 1 to 2^30", float: "a number above 0, at most 1e18", bool: "true or false"}
LARGEST = {int: 2**30, float: 1e18}
DERIVED = ("num_key_value_heads", "head_dim", "sliding_window")  # null: as many as query heads, hidden / heads, none


def setting(raw: dict, key: str, kind: type, default=None):
    """raw[key], or `default` if it is absent. Raises ValueError if it is not of this kind."""
    value = raw.get(key, default)
    if value is None and key in DERIVED:
        return None

    fits = isinstance(value, (int, float) if kind is float else kind)
    if kind is not bool:
        fits = fits and not isinstance(value, bool) and 0 < value <= LARGEST[kind]
    if not fits:
        raise ValueError(f"{key} is {value!r:.60}: must be {KIND_TEXT[kind]}")
    return value


def nested(raw: dict, *keys: str) -> dict:
    """The first of these that is set, or {}. Raises ValueError if it is not a JSON object."""
    for key in keys:
        if raw.get(key) and not isinstance(raw[key], dict):
            raise ValueError(f"{key} is {raw[key]!r:.60}: must be a JSON object")
    return next((raw[key] for key in keys if raw.get(key)), {})


def check_rope(rope: dict) -> None:
    """Raises ValueError naming a setting that `rope_frequencies` cannot work with."""
    setting(rope, "rope_theta", float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind!r:.60} is not supported: only 'default' and 'llama3' are")
    if kind == "llama3":
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            setting(rope, key, float)
        if rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise ValueError("low_freq_factor is not below high_freq_factor")


def check_quantization(quantization: dict) -> None:
    """Raises ValueError if a `quantization_config` is not one of ours."""
    method = quantization.get("quant_method")
    if method != "flexbcq":
        raise ValueError(f"quant_method {method!r:.60} is not supported: only 'flexbcq' is; give the original model")
    setting(quantization, "bits", int)
    if quantization.get("group_size") != -1:
        setting(quantization, "group_size", int)
    if quantization.get("head_bits") is not None:
        setting(quantization, "head_bits", int)


def refuse_other_functions(raw: dict, rope: dict) -> None:
    """Raises ValueError for a setting that makes the model a different function from the one in llama.py."""
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {raw['hidden_act']!r:.60} is not supported: only 'silu' is")
    if raw.get("is_causal", True) is not True:
        raise ValueError(f"is_causal is {raw['is_causal']!r:.60}: only causal attention is supported")
    if raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1)) != 1:
        raise ValueError("partial_rotary_factor is set: only RoPE on whole heads is supported")


def read_config(raw: dict) -> LlamaConfig:
    """Check a `config.json` and pick the fields that count. Raises ValueError naming the field."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        wanted = ", ".join(MODEL_TYPES)
        raise ValueError(f"model_type {model_type!r:.60} is not supported: only {wanted} are")

    # the keys that this type reads; others may be present and are ignored
    kinds = {f.name: f.type for f in fields(LlamaConfig)} | {"rope_theta": float}
    chosen = {}
    for key, default in MODEL_TYPES[model_type].items():
        kind = bool if isinstance(default, bool) else kinds.get(key, int)
        chosen[key] = raw.get(key) if key == "no_rope_layers" else setting(raw, key, kind, default)

    # inside its window, sliding attention is plain attention
    window = chosen.pop("sliding_window", None) if chosen.pop("use_sliding_window", True) else None
    context = chosen["max_position_embeddings"]
    chosen["max_position_embeddings"] = min(context, window or context)

    # what the families do differently
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    biases = attention[:3] if model_type == "qwen2" else ()
    biases += attention if chosen.pop("attention_bias", False) else ()
    biases += mlp if chosen.pop("mlp_bias", False) else ()
    with_rope, interval = chosen.pop("no_rope_layers", None), chosen.pop("no_rope_layer_interval", None)
    n_layers = chosen["num_hidden_layers"]
    if with_rope and not (isinstance(with_rope, list) and len(with_rope) == n_layers):
        raise ValueError(f"no_rope_layers is {with_rope!r:.60}: must be a list with a 0 or 1 for each layer")
    layers = range(n_layers) if model_type == "smollm3" else ()
    without_rope = tuple(i for i in layers if not (with_rope[i] if with_rope else (i + 1) % interval))

    # rope_theta is at the top level or among the scaling parameters, and so is the original context
    rope = {"rope_theta": chosen.pop("rope_theta")} | nested(raw, "rope_scaling", "rope_parameters")
    original = raw.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", context))
    rope["original_max_position_embeddings"] = original
    check_rope(rope)
    refuse_other_functions(raw, rope)

    quantization = nested(raw, "quantization_config") or None
    if quantization:
        check_quantization(quantization)

    chosen = {key: value for key, value in chosen.items() if value is not None}
    config = LlamaConfig(
        **chosen,
        biases=biases,
        qk_norm=model_type == "qwen3",
        layers_without_rope=without_rope,
        rope=rope,
        quantization=quantization,
    )
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if heads % kv_heads:
        raise ValueError(f"{heads} attention heads do not go with {kv_heads} key/value heads: must be a multiple")
    if size % 2 or not 0 < heads * size < 2**30:
        raise ValueError(f"{heads} attention heads of size {size}: the size must be even, 2 to 2^30 / {heads}")
    return config


# ----------------------------------------------------------------------------------------------------------- reading


AGAIN = "get another copy of it"  # what helps whether it was downloaded, copied or calibrated


def open_tensors(path: Path, remedy: str = AGAIN) -> safe_open:
    """A safetensors file, to be used in a `with`. Raises OSError if it is missing, damaged or not to be read."""
    if path.is_symlink() and not path.exists():
        raise OSError(f"{path}: is a link to a file that is gone; {remedy}")
    if path.exists() and not os.access(path, os.R_OK):
        raise OSError(f"{path}: may not be read by this user; change its permissions")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise OSError(f"{path}: missing or damaged ({error}); {remedy}") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error})") from None


class Stored(NamedTuple):
    """Where a tensor is, and what its file says of it."""

    path: Path
    name: str  # in the file
    dtype: str
    shape: tuple[int, ...]


FILE_DTYPES = {"bit_planes": ("I32",), "alpha": ("F16",), "shift": ("F16",)}  # of a packed layer
FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")  # of everything else
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4}


class Checkpoint:
    """A Hugging Face folder, whose tensors are read when asked for.

    Name, dtype and shape of every tensor are checked here, before anything is computed; a tensor that the model does
    not use is an error as well, since config.json then belongs to another model. Raises OSError or ValueError with one
    line that names the file or the tensor."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if self.folder.is_file():
            raise OSError(f"{folder}: is a file; give the Hugging Face folder of the model (GGUF files are not read)")
        if not self.folder.is_dir():
            raise OSError(f"{folder}: no such folder; give one, or org/name of a model on Hugging Face")

        if (self.folder / "adapter_config.json").exists():
            raise ValueError(
                f"{self.folder}: holds an adapter (adapter_config.json); merge it into the weights first, for example "
                "with merge_and_unload of peft; if that is done, delete adapter_config.json"
            )

        self.raw_config = self._json("config.json")
        try:
            self.config = read_config(self.raw_config)
        except ValueError as error:
            raise ValueError(f"{self.folder / 'config.json'}: {error}") from None

        self._stored = self._read_headers()
        has_head = any(name.startswith("lm_head.") for name in self._stored)
        self.tied = self.config.tie_word_embeddings and not has_head
        self.head_names = ("model.embed_tokens",) if self.tied else ("model.embed_tokens", "lm_head")
        self._check()

    def _json(self, name: str) -> dict:
        try:
            content = json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            raise OSError(f"{self.folder}: no {name} in this folder; is it a Hugging Face checkpoint?") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.folder / name}: not JSON ({error}); {AGAIN}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{self.folder / name}: not a JSON object; {AGAIN}")
        return content

    # ---- the files

    def shards(self) -> list[Path]:
        """The weight files: `model.safetensors`, or those the index names."""
        single, index = self.folder / "model.safetensors", "model.safetensors.index.json"
        if single.exists() or single.is_symlink():
            return [single]
        if not (self.folder / index).exists():
            others = [path.name for path in self.folder.iterdir() if path.suffix in (".bin", ".pth", ".gguf")]
            found = f"only {sorted(others)[0]}, which is not read; " if others else ""
            raise OSError(f"{self.folder}: no model.safetensors in this folder, nor an index; {found}give a whole one")
        try:
            names = sorted(set(self._json(index)["weight_map"].values()))
            outside = [name for name in names if name != Path(name).name]
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"{self.folder / index}: no weight_map from tensors to files; {AGAIN}") from None
        if outside:
            raise ValueError(f"{self.folder / index}: {outside[0]!r:.60} is not a file name; {AGAIN}")
        return [self.folder / name for name in names]

    def file_size(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.shards())

    def n_bytes(self, wanted: Callable[[str], bool]) -> int:
        """Bytes that the tensors with a wanted name take in the files."""
        return sum(
            math.prod(stored.shape) * DTYPE_BYTES.get(stored.dtype, 0)
            for name, stored in self._stored.items()
            if wanted(name)
        )

    def _read_headers(self) -> dict[str, Stored]:
        """All tensors in the files, by name."""
        found = {}
        for path in self.shards():
            with open_tensors(path) as file:
                for name in file.keys():
                    if name in found:
                        raise ValueError(f"{path}: {name} is also in {found[name].path.name}; {AGAIN}")
                    header = file.get_slice(name)
                    found[name] = Stored(path, name, header.get_dtype(), tuple(header.get_shape()))

        # saved from the model without its head: the names lack a part
        if "embed_tokens.weight" in found:
            found = {name if name.startswith("lm_head.") else f"model.{name}": entry for name, entry in found.items()}
        return found

    def _entry(self, name: str) -> Stored:
        """Raises ValueError if there is no such tensor."""
        if name not in self._stored:
            raise ValueError(f"{self.folder}: tensor {name} is in none of the files; do they belong to config.json?")
        return self._stored[name]

    def _check(self) -> None:
        """Raises ValueError naming a tensor that is absent, or not what config.json says."""
        if any(name.endswith((".qweight", ".weight_packed", ".absmax")) for name in self._stored):
            raise ValueError(f"{self.folder}: is quantized by other software (qweight or the like); give the original")

        # is every block there? Before a module is built for each of them
        for i in range(self.config.num_hidden_layers):
            self._entry(f"model.layers.{i}.input_layernorm.weight")
        if not self.config.quantization and any(name.endswith(".bit_planes") for name in self._stored):
            raise ValueError(f"{self.folder}: holds bit-planes, but config.json has no quantization_config; {AGAIN}")

        # what the model needs
        with torch.device("meta"):
            expected = self._put_planes(Llama(self.config), "").state_dict()
        if self.tied:
            expected = {name: t for name, t in expected.items() if not name.startswith("lm_head.")}
        for name, t in expected.items():
            *_, dtype, shape = self._entry(name)
            if shape != t.shape:
                raise ValueError(f"{self.folder}: {name} has shape {shape}, config.json says {tuple(t.shape)}")
            supported = FILE_DTYPES.get(name.rsplit(".", 1)[-1], FLOAT_DTYPES)
            if dtype not in supported:
                raise ValueError(f"{self.folder}: {name} is {dtype}, supported is {' or '.join(supported)}")

        # what it does not use; early Llamas stored the RoPE frequencies, which we compute
        for name in sorted(self._stored.keys() - expected.keys()):
            if not name.endswith("rotary_emb.inv_freq"):
                raise ValueError(f"{self.folder}: tensor {name} has no place in the model that config.json describes")

    # ---- tensors

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored dtype. Raises ValueError if it is not finite.

        The file is opened for this tensor alone: a file left mapped would count as memory in use."""
        entry = self._entry(name)
        with open_tensors(entry.path) as file:
            tensor = file.get_tensor(entry.name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{self.folder}: {name} contains NaN or infinity; {AGAIN}")
        return tensor

    def tensors(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """All tensors with a wanted name, as they are in the files."""
        return {name: self.tensor(name) for name in self._stored if wanted(name)}

    def check_ids(self, ids: Tensor) -> Tensor:
        """Raises ValueError if there are tokens the model does not know."""
        wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(wrong):
            raise ValueError(
                f"{self.folder}: there is a token {wrong[0]}, config.json says vocab_size {self.config.vocab_size}; "
                "do tokenizer.json and config.json belong to different models?"
            )
        return ids

    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: of generation_config.json, else of config.json; none if neither names one."""
        generation = self._json("generation_config.json") if (self.folder / "generation_config.json").exists() else {}
        eos = generation.get("eos_token_id")
        eos = self.raw_config.get("eos_token_id") if eos is None else eos
        return tuple(token for token in (eos if isinstance(eos, list) else [eos]) if self.is_token(token))

    def is_token(self, token: object) -> bool:
        """Whether this, from a JSON file, is a token that the model knows."""
        return type(token) is int and 0 <= token < self.config.vocab_size

    def embed(self, ids: Tensor) -> Tensor:
        """ids: (samples, length) int64 -> embeddings (samples, length, hidden_size) float32, without a float32 copy of
        the whole table."""
        table, x = self.embedding(None), torch.empty(*ids.shape, self.config.hidden_size)
        for part, place in zip(self.check_ids(ids), x):
            place.copy_(table(part))
        return x

    # ---- modules

    def _put_planes(self, module: nn.Module, prefix: str) -> nn.Module:
        """Put an empty `BCQLinear` or `BCQEmbedding` wherever the files hold bit-planes."""
        for name, layer in list(module.named_modules()):
            full_name = (prefix + name).removesuffix(".")  # the module may be the layer itself
            if not isinstance(layer, nn.Linear | nn.Embedding) or f"{full_name}.bit_planes" not in self._stored:
                continue
            out_features, in_features = layer.weight.shape
            bits, group_size = self.config.quantization["bits"], self.config.quantization["group_size"]
            if full_name in self.head_names:
                bits, group_size = self.config.quantization.get("head_bits"), -1
            kind = BCQEmbedding if isinstance(layer, nn.Embedding) else BCQLinear
            try:
                has_bias = getattr(layer, "bias", None) is not None
                packed = kind(in_features, out_features, bits, group_size, has_bias)
            except ValueError as error:
                raise ValueError(f"{self.folder / 'config.json'}: {full_name}: {error}") from None
            if layer is module:
                return packed
            module.set_submodule(name, packed)
        return module

    def _fill(self, module: nn.Module, prefix: str, dtype: torch.dtype | None, device) -> nn.Module:
        """Load a module that was built on the meta device. dtype: None: as stored"""
        module = self._put_planes(module, prefix)
        state = {name: self.tensor(prefix + name).to(device) for name in module.state_dict()}  # as stored: fewer bytes

        # a BCQLinear keeps its int32 planes and fp16 scales, whatever dtype it multiplies with
        state = {name: t.to(dtype) if name.endswith(("weight", "bias")) else t for name, t in state.items()}
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False).to(device)

    def block(self, i: int, dtype=torch.float32, device="cpu") -> Block:
        """Decoder layer i."""
        with torch.device("meta"):
            block = Block(self.config, i)
        return self._fill(block, f"model.layers.{i}.", dtype, device)

    def embedding(self, dtype=torch.float32, device="cpu") -> nn.Embedding | BCQEmbedding:
        """Token embeddings: (vocab_size, hidden_size)."""
        with torch.device("meta"):
            embedding = nn.Embedding(self.config.vocab_size, self.config.hidden_size)
        return self._fill(embedding, "model.embed_tokens.", dtype, device)

    def head(self, dtype=torch.float32, device="cpu") -> nn.Sequential:
        """The final norm and lm_head: (..., hidden_size) -> logits (..., vocab_size)."""
        with torch.device("meta"):
            norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
            lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self._fill(norm, "model.norm.", dtype, device)
        return nn.Sequential(norm, self._fill(lm_head, f"{self.head_names[-1]}.", dtype, device))

    def model(self, dtype=torch.float32, device="cpu", head_dtype: torch.dtype | None = None) -> Llama:
        """The whole model; embedding and lm_head may have a dtype of their own."""
        with torch.device("meta"):
            model = Llama(self.config)
        model.model.embed_tokens = self.embedding(head_dtype or dtype, device)
        model.model.layers = nn.ModuleList(self.block(i, dtype, device) for i in range(self.config.num_hidden_layers))
        model.model.norm, lm_head = self.head(dtype, device)
        model.lm_head = lm_head.to(head_dtype or dtype)
        if self.tied and isinstance(model.lm_head, BCQLinear):
            model.lm_head._buffers = model.model.embed_tokens._buffers  # one set of bit-planes, wherever it is moved
        elif self.tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model


# ----------------------------------------------------------------------------------------------------------- writing


def sync(path: Path) -> None:
    """Wait until the disk holds the bytes of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)  # Windows needs write access to sync
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """`sync` where a folder can be synced: not on Windows and some network file systems, which do it themselves."""
    with contextlib.suppress(OSError):
        sync(folder)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name; what is written there appears under `path` whole or, on any failure, not at all.

    Raises OSError, for example when the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path.parent}: could not write {path.name} ({error})") from None
    sync_folder(path.parent)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file."""
    with whole_file(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # the library leaves 0600


def write_json(path: Path, content: dict) -> None:
    """Write one JSON file, indented."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8", newline="\n")


SIDE_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "generation_config")


def side_files(folder: Path) -> list[Path]:
    """What belongs to a model besides config and weights: tokenizer, chat template, generation settings."""
    return [path for path in sorted(folder.iterdir()) if path.name.startswith(SIDE_FILES) and path.is_file()]


def write_config(folder: Path, config: dict, source: Path | None = None) -> None:
    """Write `config.json` and, with `source`, copy its side files."""
    write_json(folder / "config.json", config)
    for file in side_files(source) if source else ():
        with whole_file(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)


def write_index(folder: Path) -> None:
    """Write `model.safetensors.index.json` for all shards in the folder."""
    weight_map = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        with open_tensors(path) as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
    total_size = sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
