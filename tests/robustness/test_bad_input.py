"""Whatever is given: one line on stderr that names the thing and the remedy, exit code 2, and no file touched."""

import errno
import json
import os
import resource
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import FEW_STEPS, call, edit_config, edit_tensors, snapshot
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import calibrate
import eval
from experiments import kernels
from support.checkpoint import Checkpoint
from support.command import fail
from support.data import empty_activations
from support.resume import locked

QUICK = ["--samples", "4", "--epochs", "1", "--group-size", "32", "--method", "rtn"]
WEIGHTS, INDEX, UP = "model.safetensors", "model.safetensors.index.json", "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def packed(toy, text, tmp_path_factory):
    """The toy in 3 bits, all tensors in one file."""
    folder = tmp_path_factory.mktemp("packed") / "out"
    assert call(calibrate.main, "--model", toy, "--text", text, "--out", folder, *QUICK).code == 0
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / WEIGHTS)
    return folder


# ---------------------------------------------------------------------------------------- spoiling a model folder


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def quantization(**changes):
    def spoil(folder):
        old = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
        edit_config(folder, quantization_config={key: value for key, value in old.items() if value is not None})

    return spoil


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(name, size):
    return lambda folder: os.truncate(folder / name, size)


def tensors(change):
    return lambda folder: edit_tensors(folder, change)


def put(name, value):
    """The tensor of this name, or an element of it, becomes `value`."""

    def change(stored):
        stored[name] = value if isinstance(value, torch.Tensor) else stored[name].clone().fill_(value)

    return tensors(change)


def header(old, new):
    """Replace bytes in the header of the weights, of the same length."""

    def spoil(folder):
        data = (folder / WEIGHTS).read_bytes()
        assert data.count(old, 0, 10_000) >= 1 and len(old) == len(new)
        (folder / WEIGHTS).write_bytes(data.replace(old, new, 1))

    return spoil


def shards(weight_map, duplicate=False):
    """Weights split in two files, found through an index; some tensors in both."""

    def spoil(folder):
        stored = load_file(folder / WEIGHTS)
        names = sorted(stored)
        save_file({name: stored[name] for name in names[: 12 if duplicate else 10]}, folder / "a.safetensors")
        save_file({name: stored[name] for name in names[10:]}, folder / "b.safetensors")
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def vocabulary(folder):
    """A model for half of the tokens."""
    edit_config(folder, vocab_size=100)
    names = "model.embed_tokens.weight", "lm_head.weight"
    edit_tensors(folder, lambda stored: stored.update({name: stored[name][:100].clone() for name in names}))


BOTH = {"1": "a.safetensors", "2": "b.safetensors"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

OPTIONS = {  # of calibrate.py
    "option without a number": (["--bits", "x"], "invalid int value"),
    "option that does not exist": (["--bit-width", "3"], "unrecognized arguments"),
    "unknown method": (["--method", "magic"], "invalid choice: 'magic'"),
    "no such model": (["--model", "meta-llama/Nope"], "meta-llama/Nope: is not in the cache, and the Hub cannot"),
    "model is a file": (["--model", __file__], "is a file; give the Hugging Face folder"),
    "model is nothing": (["--model", ""], "no config.json in this folder"),
    "9 bits": (["--bits", "9"], "--bits 9: choose 1 to 8"),
    "0 bits": (["--bits", "0"], "--bits 0: choose 1 to 8"),
    "9 bits for the head": (["--head-bits", "9"], "--head-bits 9: choose 1 to 8"),
    "0 bits for the head": (["--head-bits", "0"], "--head-bits 0: choose 1 to 8"),
    "words for the head": (["--head-bits", "all"], "argument --head-bits: invalid int value: 'all'"),
    "group size": (
        ["--group-size", "48"],
        "model.layers.0.self_attn.q_proj: in_features 64 cannot be cut into groups of 48 (try 32, 64",
    ),
    "group size for some layers": (
        ["--group-size", "64"],
        "mlp.down_proj: in_features 160 cannot be cut into groups of 64 (try 32, 160",
    ),
    "group size below": (["--group-size", "-2"], "cannot be cut into groups of -2"),
    "long sequence": (["--seq-len", "100"], "--seq-len 100: choose 2 to 64"),
    "negative sequence": (["--seq-len", "-3"], "--seq-len -3: choose 2 to 64"),
    "output without a name": (["--out", "."], "--out .: give the name of a new folder"),
    "output without a name, above": (["--out", ".."], "--out ..: give the name of a new folder"),
    "no samples": (["--samples", "0"], "--samples 0: must be at least 1"),
    "samples beyond memory": (["--samples", "999999999"], "--samples 999999999, activations in memory: needs"),
    "samples beyond the disk": (["--samples", "9999999999", "--offload", "/tmp"], "--offload /tmp: needs"),
    "no folder to offload to": (["--offload", "nowhere"], "--offload nowhere: not a writable folder"),
    "no epochs": (["--epochs", "-1"], "--epochs -1: must be at least 1"),
    "no batch": (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    "batch that does not divide": (["--batch-size", "3"], "--batch-size 3: must divide --samples 4"),
    "negative seed": (["--seed", "-1"], "--seed -1: choose 0 to 4294967295"),
    "no period": (["--period", "0"], "--period 0: must be at least 1"),
    "negative rate": (["--mapping-rate", "-1"], "--mapping-rate -1.0: choose 0 to 1"),
    "tau that is no number": (["--tau", "nan"], "--tau nan: choose 0 to 1000000000.0"),
    "long windows": (["--eval-seq-len", "99"], "--eval-seq-len 99: choose 2 to 64, the context of this model"),
    "empty windows": (["--eval-seq-len", "0"], "--eval-seq-len 0: choose 2 to 64, the context of this model"),
    "no windows": (["--eval-windows", "0"], "--eval-windows 0: must be at least 1"),
    "endless seed": (["--seed", "9" * 30], "choose 0 to 4294967295"),
    "device": (["--device", "abacus"], "--device abacus: not usable"),
    "device without data": (["--device", "meta"], "--device meta: not usable"),
    "device of another system": (["--device", "mps"], "--device mps: not usable"),
    "no text": (["--text", "nowhere.txt"], "nowhere.txt: cannot read"),
    "text is a folder": (["--text", "/"], "/: cannot read"),
    "no evaluation text": (["--eval-text", "nowhere.txt"], "nowhere.txt: cannot read"),
    "output in no folder": (["--out", "no/where/out"], "no/where is not a writable folder; create it"),
    "output below a file": (["--out", f"{__file__}/out"], "is not a writable folder"),
    "output is a file": (["--out", __file__], "exists and is no empty folder"),
    "output is an empty file": (["--out", "/dev/null"], "exists and is no empty folder"),
    "output name too long": (["--out", "x" * 300], "File name too long"),
    "output that is not UTF-8": (["--out", "x\udcff"], "not UTF-8"),
}
KERNEL_OPTIONS = {
    "device": (["--device", "abacus"], "--device abacus: not usable"),
    "shape with one side": (["--shapes", "64"], "argument --shapes: invalid rows_x_columns value: '64'"),
    "width that does not fit": (["--shapes", "64x100"], "in_features 100 cannot be cut into groups of 128"),
    "shape of nothing": (["--shapes", "0x128"], "argument --shapes: invalid rows_x_columns value: '0x128'"),
    "no tokens": (["--batch", "0"], "argument --batch: invalid positive value: '0'"),
    "no rounds": (["--rounds", "0"], "argument --rounds: invalid positive value: '0'"),
    "path of a GPU": (["--device", "cpu", "--paths", "readable"], "--paths readable: this machine offers "),
    "bits": (["--bits", "9", "--shapes", "64x64"], "9 bits: choose 1 to 8"),
    "group size": (["--group-size", "48", "--shapes", "64x64"], "cannot be cut into groups of 48"),
}
MODEL = {  # what is done to the folder of an original model
    "no config": (remove("config.json"), "no config.json in this folder"),
    "empty config": (write("config.json", b""), "config.json: not JSON"),
    "broken config": (write("config.json", b'{"model_type": "llama",'), "config.json: not JSON"),
    "binary config": (write("config.json", b"\xff\xfe\x00\x80"), "config.json: not JSON"),
    "config nested beyond reason": (write("config.json", b"[" * 100_000), "config.json: not JSON"),
    "config is a list": (write("config.json", b"[]"), "config.json: not a JSON object"),
    "other architecture": (config(model_type="gemma2"), "model_type 'gemma2' is not supported"),
    "biases that are not there": (config(attention_bias=True), "self_attn.q_proj.bias is in none of the files"),
    "other activation": (config(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "size is missing": (config(hidden_size=None), "config.json: hidden_size is None: must be a whole number"),
    "size is a string": (config(hidden_size="64"), "hidden_size is '64': must be a whole number"),
    "size is a list": (config(vocab_size=[2048]), "vocab_size is [2048]: must be a whole number"),
    "size is negative": (config(intermediate_size=-160), "intermediate_size is -160: must be a whole number"),
    "size is a truth value": (config(num_hidden_layers=True), "num_hidden_layers is True: must be a whole number"),
    "size is not a number": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan: must be a number above 0"),
    "size is infinite": (
        config(rms_norm_eps=float("inf")),
        "rms_norm_eps is inf: must be a number above 0, at",
    ),
    "truth value is a string": (config(tie_word_embeddings="no"), "tie_word_embeddings is 'no': must be true or false"),
    "size beyond memory": (config(hidden_size=2**30), "has shape (2048, 64), config.json says (2048, 1073741824)"),
    "fewer blocks": (config(num_hidden_layers=1), "tensor model.layers.1.input_layernorm.weight has no place"),
    "a billion blocks": (config(num_hidden_layers=10**9), "tensor model.layers.2.input_layernorm.weight is in none"),
    "heads that do not divide": (config(num_key_value_heads=3), "4 attention heads do not go with 3"),
    "odd head size": (config(head_dim=15), "4 attention heads of size 15: the size must be even"),
    "rope for some layers": (
        config(model_type="smollm3", no_rope_layers=[1]),
        "no_rope_layers is [1]: must be a list with a 0 or 1 for each layer",
    ),
    "rope by a number": (config(model_type="smollm3", no_rope_layers=4), "no_rope_layers is 4: must be a list"),
    "window is negative": (
        config(model_type="mistral", sliding_window=-1),
        "sliding_window is -1: must be a whole number",
    ),
    "rope is a string": (config(rope_scaling="linear"), "rope_scaling is 'linear': must be a JSON object"),
    "unknown rope": (config(rope_scaling={"rope_type": "yarn"}), "rope_type 'yarn' is not supported"),
    "unknown rope, newer file": (config(rope_parameters={"rope_type": "yarn"}), "rope_type 'yarn' is not supported"),
    "incomplete rope": (config(rope_scaling={"rope_type": "llama3"}), "factor is None: must be a number above 0"),
    "rope frequency of zero": (config(rope_scaling={"rope_theta": 0}), "rope_theta is 0: must be a number above 0"),
    "rope frequency that PyTorch cannot take": (
        config(rope_scaling={"rope_theta": 10**20}),
        "rope_theta is 100000000000000000000: must be a number above 0, at most 1e18",
    ),
    "rope range upside down": (
        config(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 64, "low_freq_factor": 5}),
        "low_freq_factor is not below high_freq_factor",
    ),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json: missing or damaged"),
    "truncated tokenizer": (truncate("tokenizer.json", 5000), "tokenizer.json: missing or damaged"),
    "tokenizer of another model": (vocabulary, "belong to different models?"),
    "an adapter": (write("adapter_config.json", b"{}"), "if that is done, delete adapter_config.json"),
    "no weights": (remove(WEIGHTS), "no model.safetensors in this folder"),
    "shards without an index": (
        lambda f: (f / WEIGHTS).rename(f / "model-00001-of-00001.safetensors"),
        "no model.safetensors in this folder, nor an index",
    ),
    "weights that are a folder": (
        lambda f: (remove(WEIGHTS)(f), (f / WEIGHTS).mkdir()),
        "model.safetensors: cannot be read (",
    ),
    "no context": (config(max_position_embeddings=1), "choose 2 to 1, the context of this model"),
    "empty weights": (write(WEIGHTS, b""), "model.safetensors: missing or damaged"),
    "weights truncated in the length": (truncate(WEIGHTS, 5), "model.safetensors: missing or damaged"),
    "weights truncated in the header": (truncate(WEIGHTS, 1000), "model.safetensors: missing or damaged"),
    "weights truncated in the data": (truncate(WEIGHTS, 300_000), "model.safetensors: missing or damaged"),
    "weights that claim a huge header": (
        write(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"),
        "model.safetensors: missing or damaged",
    ),
    "pickle for weights": (lambda f: torch.save({"a": torch.ones(2)}, f / WEIGHTS), "missing or damaged"),
    "flipped bit in a name": (header(b"up_proj", b"uq_proj"), "up_proj.weight is in none of the files"),
    "flipped bit in a dtype": (header(b"BF16", b"BF17"), "model.safetensors: missing or damaged"),
    "flipped bit in a size": (header(b"2048,64]", b"2048,65]"), "model.safetensors: missing or damaged"),
    "negative size": (header(b"2048,64]", b"2048,-4]"), "model.safetensors: missing or damaged"),
    "NaN in a weight": (put(f"{UP}.weight", torch.nan), f"{UP}.weight contains NaN or infinity; get another"),
    "weight of another shape": (put(f"{UP}.weight", torch.zeros(3, 3)), f"{UP}.weight has shape (3, 3), config.json"),
    "weight of whole numbers": (
        put(f"{UP}.weight", torch.zeros(160, 64, dtype=torch.int8)),
        f"{UP}.weight is I8, supported is F32 or",
    ),
    "weight is missing": (tensors(lambda t: t.pop(f"{UP}.weight")), f"tensor {UP}.weight is in none of the files"),
    "weight of another model": (put(f"{UP}.bias", torch.zeros(160)), f"tensor {UP}.bias has no place in the model"),
    "index is not JSON": (lambda f: (remove(WEIGHTS)(f), write(INDEX, b"{")(f)), "index.json: not JSON"),
    "index without a map": (shards(None), "index.json: no weight_map"),
    "index with a list": (shards(["a.safetensors"]), "index.json: no weight_map"),
    "index with numbers": (shards({"1": 7}), "index.json: no weight_map"),
    "index to other folders": (shards({"1": "../../etc/passwd"}), "'../../etc/passwd' is not a file name"),
    "index to nowhere": (shards(BOTH | {"3": "c.safetensors"}), "c.safetensors: missing or damaged"),
    "index to a part": (shards({"1": "a.safetensors"}), "is in none of the files"),
    "tensor in two files": (shards(BOTH, duplicate=True), "b.safetensors: model."),
    "tensor in two files, the other name": (shards(BOTH, duplicate=True), "is also in a.safetensors; get another copy"),
}
PACKED = {  # what is done to the folder of a packed model
    "other software": (quantization(quant_method="gptq"), "quant_method 'gptq' is not supported: only 'flexbcq' is"),
    "no quant_method": (quantization(quant_method=None), "quant_method None is not supported"),
    "no bits": (quantization(bits=None), "bits is None: must be a whole number"),
    "bits of another type": (quantization(bits="3"), "bits is '3': must be a whole number"),
    "9 bits": (quantization(bits=9), "self_attn.q_proj: 9 bits: choose 1 to 8"),
    "other bits": (quantization(bits=2), "bit_planes has shape (3, 2, 2, 32), config.json says (2, 2, 2, 32)"),
    "no group size": (quantization(group_size=None), "group_size is None: must be a whole number"),
    "group size that does not fit": (quantization(group_size=48), "cannot be cut into groups of 48 (try 32, 64"),
    "other group size": (quantization(group_size=-1), "alpha has shape (3, 2, 2, 32), config.json says (3, 2, 1, 32)"),
    "quantization is a string": (config(quantization_config="int4"), "quantization_config is 'int4': must be a JSON"),
    "no quantization": (config(quantization_config=None), "holds bit-planes, but config.json has no quantization"),
    "planes of another shape": (
        put(f"{UP}.bit_planes", torch.zeros(3, 5, 2, 31, dtype=torch.int32)),
        f"{UP}.bit_planes has shape (3, 5, 2, 31), config.json says (3, 5, 2, 32)",
    ),
    "planes of another type": (
        put(f"{UP}.bit_planes", torch.zeros(3, 5, 2, 32)),
        f"{UP}.bit_planes is F32, supported is I32",
    ),
    "infinite alpha": (put(f"{UP}.alpha", torch.inf), f"{UP}.alpha contains NaN or infinity"),
    "no shift": (tensors(lambda t: t.pop(f"{UP}.shift")), f"tensor {UP}.shift is in none of the files"),
}
TEXTS = {
    "is missing": (None, "cannot read this text file"),
    "empty": (b"", "is empty"),
    "blank": (b"  \n ", "is empty"),
    "not UTF-8": (b"abc \xff\xfe", "not UTF-8 at byte 4"),
    "not UTF-8 after a byte order mark": (b"\xef\xbb\xbfabc\xff", "not UTF-8 at byte 6; if it is a text, convert"),
    "too short": (b"short", "tokens are less than one window of 64; give more text, or a smaller"),
}
EVAL_OPTIONS = {
    "long window": (["--seq-len", "65"], "--seq-len 65: choose 2 to 64"),
    "short window": (["--seq-len", "1"], "--seq-len 1: choose 2 to 64"),
    "device": (["--device", "tpu9"], "--device tpu9: not usable here"),
    "device of another system": (["--device", "mps"], "--device mps: not usable here"),
    "empty prompt": (["--prompt", ""], "--prompt: is empty"),
    "long prompt": (["--prompt", "x", "--tokens", "64"], "do not fit"),
    "no tokens": (["--prompt", "x", "--tokens", "0"], "--tokens 0: must be at least 1"),
    "negative tokens": (["--prompt", "x", "--tokens", "-5"], "--tokens -5: must be at least 1"),
    "tokens are words": (["--tokens", "many"], "invalid int value"),
    "prompt that is not UTF-8": (["--prompt", "caf\udce9"], "'caf\\udce9': not UTF-8"),
}


def assert_refused(result, message, folder, before):
    lines = result.err.strip().splitlines()
    assert result.code == 2 and message in lines[-1] and lines[-1].startswith("error: "), result.err
    assert sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in result.err
    assert snapshot(folder) == before


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_option_of_calibrate(case, toy, text, tmp_path):
    options, message = OPTIONS[case]
    result = call(calibrate.main, "--model", toy, "--text", text, "--out", tmp_path / "out", *QUICK, *options)
    assert_refused(result, message, tmp_path, {})


@pytest.mark.parametrize("command", [calibrate, eval], ids=["calibrate", "eval"])
@pytest.mark.parametrize("case", MODEL)
def test_damaged_model(case, command, toy, text, tmp_path):
    spoil, message = MODEL[case]
    model = shutil.copytree(toy, tmp_path / "model")
    spoil(model)
    before = snapshot(tmp_path)
    options = ["--out", tmp_path / "out", *QUICK] if command is calibrate else []
    result = call(command.main, "--model", model, "--text", text, *options)
    assert_refused(result, message, tmp_path, before)


@pytest.mark.parametrize("mode", ["text", "prompt"])
@pytest.mark.parametrize("case", PACKED)
def test_damaged_packed_model(case, mode, packed, text, tmp_path):
    spoil, message = PACKED[case]
    model = shutil.copytree(packed, tmp_path / "model")
    spoil(model)
    before = snapshot(tmp_path)
    options = ["--text", text] if mode == "text" else ["--prompt", "def", "--tokens", 5]
    assert_refused(call(eval.main, "--model", model, *options), message, tmp_path, before)


@pytest.mark.parametrize("case", TEXTS)
def test_bad_text(case, toy, text, tmp_path):
    content, message = TEXTS[case]
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    before = snapshot(tmp_path)
    for result in (
        call(eval.main, "--model", toy, "--text", path),
        call(calibrate.main, "--model", toy, "--text", text, "--eval-text", path, "--out", tmp_path / "out"),
    ):
        assert_refused(result, message, tmp_path, before)
        assert "bad.txt" in result.err


@pytest.mark.parametrize("case", EVAL_OPTIONS)
def test_bad_option_of_eval(case, toy, tmp_path):
    options, message = EVAL_OPTIONS[case]
    assert_refused(call(eval.main, "--model", toy, *options), message, tmp_path, {})


@pytest.mark.parametrize("case", KERNEL_OPTIONS)
def test_bad_option_of_the_kernel_benchmark(case, tmp_path):
    options, message = KERNEL_OPTIONS[case]
    assert_refused(call(kernels.main, "--out", tmp_path / "out", *options), message, tmp_path, {})


def test_an_output_folder_in_use_is_left_alone(toy, text, tmp_path):
    (tmp_path / "precious").write_text("data")
    result = call(calibrate.main, "--model", toy, "--text", text, "--out", tmp_path, *QUICK)
    assert_refused(result, "exists and is no empty folder", tmp_path, {"precious": b"data"})


def test_a_quantized_model_is_not_quantized_again(packed, text, tmp_path):
    result = call(calibrate.main, "--model", packed, "--text", text, "--out", tmp_path / "out", *QUICK)
    assert_refused(result, "is quantized already", tmp_path, {})


@pytest.mark.parametrize("i", [0, 1], ids=["in rehearsal", "in the run"])
def test_a_loss_that_is_not_finite_names_the_block(i, toy, text, tmp_path):
    model = shutil.copytree(toy, tmp_path / "model")
    put(f"model.layers.{i}.post_attention_layernorm.weight", 1e18)(model)  # its square is beyond float32
    options = [*FEW_STEPS, "--feedback-passes", "0"]  # error feedback would notice the inputs
    result = call(calibrate.main, "--model", model, "--text", text, "--out", tmp_path / "out", *options)
    assert result.code == 2 and f"error: model.layers.{i}: the loss before training is" in result.err, result.err
    assert (tmp_path / "out.partial").exists() == bool(i)  # what is finished is kept


@pytest.mark.parametrize("kind", ["link", "mount"])
def test_an_output_that_cannot_be_renamed_over_is_refused_at_once(kind, toy, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if kind == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    result = call(calibrate.main, "--model", toy, "--text", text, "--out", out, *QUICK)
    assert_refused(result, "out: is a link or a mount point", tmp_path, {})


def test_a_folder_that_cannot_be_locked_is_said_and_used(tmp_path, capsys, monkeypatch):
    def acquire(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with locked(tmp_path):
        assert f"{tmp_path}: cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().out


def test_activations_that_do_not_fit_are_said(tmp_path):
    """No file may grow beyond 10 kB."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(OSError, match=rf"--offload {tmp_path}: 0.016 GB do not fit \(File too large"):
            empty_activations((1000, 64, 128), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error, said", [(MemoryError(), "out of memory"), (TimeoutError(), "TimeoutError()")], ids=str)
def test_an_error_without_a_text_is_named(error, said, capsys):
    assert fail(error) == 2 and capsys.readouterr().err == f"\nerror: {said}\n"


def test_a_link_to_nowhere_in_the_model_folder_is_not_copied(toy, text, tmp_path):
    model = shutil.copytree(toy, tmp_path / "model")
    (model / "tokenizer.model").symlink_to("nowhere")
    result = call(calibrate.main, "--model", model, "--text", text, "--out", tmp_path / "out", *QUICK)
    assert result.code == 0 and not (tmp_path / "out" / "tokenizer.model").exists()


def test_prompt_with_tokens_the_model_does_not_know(toy, tmp_path):
    model = shutil.copytree(toy, tmp_path / "model")
    vocabulary(model)
    result = call(eval.main, "--model", model, "--prompt", "def f(x):", "--tokens", 5)
    assert_refused(result, "belong to different models?", tmp_path, snapshot(tmp_path))


# --------------------------------------------------------------------------------------------------------- fuzzing


@contextmanager
def little_memory(gigabytes=2):
    """Whatever asks for more than this beyond what is there now fails."""
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2**30, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@torch.inference_mode()
def assert_loads_or_is_refused(folder):
    with little_memory():
        try:
            Checkpoint(folder).model()(torch.tensor([[1, 2, 3]]))
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.fixture(scope="module")
def fuzzed(toy, packed, tmp_path_factory):
    """Copies of the original and the packed model to be damaged, with the undamaged beside them."""
    root = tmp_path_factory.mktemp("fuzzed")
    return [(shutil.copytree(model, root / str(i)), model) for i, model in enumerate((toy, packed))]


many = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**63, 1e308])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@many
@given(st.integers(0, 1), st.data())
def test_any_config_loads_or_is_refused(fuzzed, which, data):
    """One or two settings, at the top or nested, become anything that JSON can say."""
    folder, whole = fuzzed[which]
    raw = json.loads((whole / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        part = data.draw(st.sampled_from([raw] + [value for value in raw.values() if value and type(value) is dict]))
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(json_values)
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        assert_loads_or_is_refused(folder)
    finally:
        shutil.copy(whole / "config.json", folder)


@many
@given(st.integers(0, 1), st.floats(0, 1), st.binary(min_size=1, max_size=4), st.booleans())
@example(0, 0.0, b"\xff" * 8, False)
def test_any_damage_to_the_weights_loads_or_is_refused(fuzzed, which, place, noise, cut_off):
    """A few bytes somewhere in length or header become others, or the file ends there."""
    folder, whole = fuzzed[which]
    content = (whole / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    offset = int(place * (len(content) if cut_off else 8 + length - len(noise)))
    content = content[:offset] if cut_off else content[:offset] + noise + content[offset + len(noise) :]
    (folder / WEIGHTS).write_bytes(content)
    try:
        assert_loads_or_is_refused(folder)
    finally:
        shutil.copy(whole / WEIGHTS, folder)


@many
@given(json_values | st.fixed_dictionaries({"weight_map": json_values}))
@example({"weight_map": {"a": "model.safetensors/../x"}})
@example({"weight_map": {"a": ""}})
@example({"weight_map": {"a": "."}})
@example({"weight_map": {"a": "config.json"}})
@example({"weight_map": {"a": "x\0y"}})
def test_any_index_loads_or_is_refused(fuzzed, content):
    folder, whole = fuzzed[0]
    (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / INDEX).write_text(json.dumps(content))
    try:
        assert_loads_or_is_refused(folder)
    finally:
        shutil.copy(whole / WEIGHTS, folder)
