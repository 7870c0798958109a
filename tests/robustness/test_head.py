"""--head-bits: embedding and lm_head as bit-planes, tied and not."""

import json
import shutil

import pytest
import torch
from helpers import call, edit_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import calibrate
import eval
import support.transformers_plugin  # noqa: F401 (registers the format)
from eval import perplexity
from kernel import BCQEmbedding, BCQLinear
from support import plan, resume
from support.checkpoint import Checkpoint
from support.data import cut, load_tokenizer, read_text, tokenize
from support.settings import TINY, Settings
from support.tasks import load_model

VOCABULARY = 2049  # one row beyond a tile
QUICK = ["--method", "rtn", "--bits", 4, "--group-size", 32, "--samples", 4, "--no-baselines", "--head-bits", 6]
PARTS = ("bit_planes", "alpha", "shift")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "model"
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128 if request.param else 96, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=request.param,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


def quantize(model, text, out, *options):
    result = call(calibrate.main, "--model", model, "--text", text, "--out", out, *QUICK, *options)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def packed(model, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "out"
    quantize(model, text, folder)
    return folder


def stored(folder):
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def test_head_is_planes_alone_and_near_the_original_row_by_row(model, packed):
    source, written = Checkpoint(model), Checkpoint(packed)
    heads = [name for name in stored(packed) if not name.startswith("model.layers.") and name != "model.norm.weight"]
    assert sorted(heads) == sorted(f"{name}.{part}" for name in source.head_names for part in PARTS)
    assert written.tied == source.tied and len(source.head_names) == (1 if source.tied else 2)
    for name, layer in zip(source.head_names, (written.embedding(), written.head()[1])):
        weight = source.tensor(f"{name}.weight").float()
        error = (layer.dequantize() - weight).norm(dim=1) / weight.norm(dim=1)
        assert error.shape == (VOCABULARY,) and 0 < error.max() < 0.06
        assert layer.alpha.shape[2] == 1  # a row is one group


def test_perplexity_is_that_of_the_dequantized_head(packed, text, tmp_path):
    """The same folder with ordinary float32 weights for embedding and lm_head."""
    checkpoint, tensors = Checkpoint(packed), stored(packed)
    for name, layer in zip(checkpoint.head_names, (checkpoint.embedding(), checkpoint.head()[1])):
        tensors = {key: t for key, t in tensors.items() if not key.startswith(f"{name}.")}
        tensors[f"{name}.weight"] = layer.dequantize()
    plain = shutil.copytree(packed, tmp_path / "plain", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, plain / "model.safetensors")

    windows = cut(tokenize(load_tokenizer(packed), read_text(text), "text", 64), 64)
    expected = perplexity(Checkpoint(plain), windows)
    assert perplexity(checkpoint, windows) == pytest.approx(expected, rel=1e-5)
    with torch.inference_mode():
        logits, wanted = checkpoint.model()(windows[:4]), Checkpoint(plain).model()(windows[:4])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)

    result = call(eval.main, "--model", packed, "--text", text, "--against", plain)
    assert result.code == 0, result.err
    assert float(result.out.split()[2]) == pytest.approx(0, abs=1e-6)
    spoken = [call(eval.main, "--model", f, "--prompt", "def f(x):", "--tokens", 9).out for f in (packed, plain)]
    assert spoken[0].splitlines()[0].startswith("def f(x):") and "tokens/s" in spoken[0]


def test_one_tensor_serves_both_in_a_tied_model_wherever_it_is_moved(packed):
    model = Checkpoint(packed).model(torch.bfloat16)
    for moved in (model, model.to(torch.float32), model.to("meta")):
        embedding, head = moved.model.embed_tokens, moved.lm_head
        assert type(embedding) is BCQEmbedding and type(head) is BCQLinear
        assert all((embedding.get_buffer(p) is head.get_buffer(p)) == Checkpoint(packed).tied for p in PARTS)


def test_dequantized_folder_holds_the_same_head_as_ordinary_weights(model, packed, text, tmp_path):
    quantize(model, text, tmp_path / "out", "--dequantized")
    written, tensors = Checkpoint(packed), stored(tmp_path / "out")
    for name, layer in zip(written.head_names, (written.embedding(), written.head()[1])):
        assert torch.equal(tensors[f"{name}.weight"], layer.dequantize(torch.bfloat16))


def test_rows_a_few_at_a_time_are_stored_as_all_at_once_even_tiny_ones(model, monkeypatch):
    """Tokens that were never trained may have rows far below what fp16 can hold."""
    weight = Checkpoint(model).tensor("model.embed_tokens.weight").clone()
    weight[64:100], weight[100:140] = 1e-20, 0
    settings = Settings(method="rtn", head_bits=6, device=torch.device("cpu"))
    whole = resume.quantized_head(weight, settings)
    monkeypatch.setattr(resume, "HEAD_ROWS", 32)
    parts = resume.quantized_head(weight, settings)
    assert all(torch.equal(parts[key], whole[key]) for key in PARTS)


def test_table_and_plan_count_the_head(model, text, tmp_path, monkeypatch):
    needs = []
    monkeypatch.setattr(plan, "check_one", lambda name, needed, available: needs.append(needed))
    said = quantize(model, text, tmp_path / "out").out.splitlines()
    written = Checkpoint(tmp_path / "out")
    assert needs[0] == pytest.approx(written.file_size(), rel=0.05)

    tensors = {name: t for name, t in stored(tmp_path / "out").items() if name.startswith(written.head_names)}
    size = sum(t.nbytes for t in tensors.values())
    n_weights = VOCABULARY * written.config.hidden_size * len(written.head_names)
    assert (
        f"embedding and lm_head: {8 * size / n_weights:.3f} bits per weight, {size / 1e6:.1f} MB of the files" in said
    )


@torch.inference_mode()
def test_transformers_opens_it_and_saving_keeps_it(packed, tmp_path):
    ids, ours = torch.randint(2048, (2, 50)), Checkpoint(packed)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    torch.testing.assert_close(model(ids).logits, ours.model()(ids), rtol=1e-4, atol=1e-4)
    assert (model.lm_head.alpha is model.model.embed_tokens.alpha) == ours.tied
    assert AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)(ids).logits.dtype == torch.bfloat16

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)
    torch.testing.assert_close(Checkpoint(tmp_path).model()(ids), ours.model()(ids), rtol=1e-4, atol=1e-4)
    greedy = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids[:1], **greedy), ours.model().generate(ids[:1], 8))


@pytest.mark.parametrize(
    "head_bits, message",
    [
        (None, "embed_tokens: None bits: choose 1 to 8"),
        ("6", "head_bits is '6': must be a whole number"),
        (9, "9 bits: choose 1 to 8"),
        (5, "embed_tokens.bit_planes has shape (6, 65,"),
    ],
)
def test_config_that_does_not_fit_the_planes_is_refused(head_bits, message, packed, text, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "folder")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=quantization | {"head_bits": head_bits})
    result = call(eval.main, "--model", folder, "--text", text)
    assert result.code == 2 and message in result.err and result.err.count("error: ") == 1


def test_weight_that_fp16_cannot_hold_is_refused_before_the_run(model, text, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = f"{Checkpoint(model).head_names[-1]}.weight"
    tensors[name][7, 7] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = call(calibrate.main, "--model", folder, "--text", text, "--out", tmp_path / "out", *QUICK)
    assert result.code == 2 and f"{name.removesuffix('.weight')}: its largest weight" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_quantized_head_answers_tasks(packed, tmp_path):
    """The model that answers holds the dequantized layers, and its embedding is still looked up."""
    checkpoint = Checkpoint(packed)
    model, ids = load_model(checkpoint, torch.device("cpu")), torch.arange(20)[None]
    torch.testing.assert_close(model(ids), checkpoint.model()(ids), rtol=1e-4, atol=1e-4)
    (tmp_path / "pair.jsonl").write_text(json.dumps({"sentence_good": "def f(x):", "sentence_bad": "def def"}))
    assert "accuracy" in call(eval.main, "--model", packed, "--task", tmp_path / "pair.jsonl").out
