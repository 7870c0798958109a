"""Every family of models, from its own config.json: logits, packing, ordinary weights and a resumed run."""

import json
import shutil

import pytest
import torch
from helpers import call, perplexity_by_transformers
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import calibrate
from eval import perplexity
from support.checkpoint import Checkpoint
from support.data import cut, load_tokenizer, read_text, tokenize
from support.settings import TINY

SHAPE = dict(
    vocab_size=2048, hidden_size=96, intermediate_size=160, num_hidden_layers=5, max_position_embeddings=512,
    num_attention_heads=6, num_key_value_heads=2,
)  # fmt: skip
FAMILIES = {
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral with a window": MistralConfig(**SHAPE, sliding_window=300),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "smollm3": SmolLM3Config(**SHAPE, pad_token_id=0, bos_token_id=1, eos_token_id=2),
}
FEW = ["--seq-len", 64, "--samples", 4, "--epochs", 1, "--group-size", 32, "--no-baselines", "--eval-windows", 8]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """A random model of the family with weights ten times the usual, so that RoPE matters; biases and norms too."""
    folder, config = tmp_path_factory.mktemp("families") / "model", FAMILIES[request.param]
    torch.manual_seed(0)
    config.initializer_range = 0.2
    oracle = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in oracle.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    oracle.bfloat16().save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


@torch.inference_mode()
def test_logits_are_those_of_transformers(model):
    ids = torch.randint(2048, (2, 300))
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    assert (Checkpoint(model).model()(ids) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_packed_and_ordinary_weights_have_one_perplexity_and_biases_stay(model, text, tmp_path):
    for name, kind in (("packed", []), ("plain", ["--dequantized"])):
        assert call(calibrate.main, "--model", model, "--text", text, "--out", tmp_path / name, *FEW, *kind).code == 0
    windows = cut(tokenize(load_tokenizer(model), read_text(text), "text", 64), 64)[:8]
    found = perplexity(Checkpoint(tmp_path / "packed"), windows)
    assert found == pytest.approx(perplexity_by_transformers(tmp_path / "plain", windows), rel=1e-2)

    stored = {}
    for shard in (tmp_path / "packed").glob("*.safetensors"):
        stored |= load_file(shard)
    for name, tensor in load_file(model / "model.safetensors").items():
        assert name.endswith("_proj.weight") or torch.equal(stored[name], tensor), name


def test_a_replayed_block_is_the_one_that_was_written(model, text, tmp_path):
    """All blocks but the last are finished: the last one is calibrated on what the replayed ones put out."""
    options = ["--model", model, "--text", text, *FEW, "--finish-steps", 0]
    assert call(calibrate.main, *options, "--out", tmp_path / "whole").code == 0
    partial = shutil.copytree(tmp_path / "whole", tmp_path / "out.partial")
    content = json.loads((partial / "calibration.json").read_text())
    content["blocks"].pop()
    (partial / "calibration.json").write_text(json.dumps(content))
    last = sorted(partial.glob("model-*"))[-2]
    expected = last.read_bytes()
    last.unlink()
    assert call(calibrate.main, *options, "--out", tmp_path / "out").code == 0
    assert (tmp_path / "out" / last.name).read_bytes() == expected
