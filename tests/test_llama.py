"""The Llama, read from checkpoint folders, against `transformers`."""

import json
import shutil

import pytest
import torch
from helpers import edit_config, edit_tensors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from llama import KVCache
from support.checkpoint import Checkpoint

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN_ROPE = {"rope_type": "default"}


def llama(heads, kv_heads, config=LlamaConfig, **more):
    return config(num_attention_heads=heads, num_key_value_heads=kv_heads, **SHAPE, **more)


KINDS = {
    "llama-2": llama(6, 6),
    "llama-3": llama(6, 2, rope_parameters=PLAIN_ROPE | {"rope_theta": 5e5}),
    "llama-3.1": llama(6, 2, rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5}),
    "llama-3.2": llama(
        6, 2, rope_parameters=LLAMA3_ROPE | {"factor": 32.0, "rope_theta": 5e5}, head_dim=32, tie_word_embeddings=True
    ),
    "smollm2": llama(
        3, 1, rope_parameters=PLAIN_ROPE | {"rope_theta": 1e5}, tie_word_embeddings=True, rms_norm_eps=1e-5
    ),
    "tinyllama": llama(8, 2, rms_norm_eps=1e-5),
    "mistral": llama(6, 2, MistralConfig, sliding_window=None),
}


def oracle(config, folder, **options):
    """A model of `transformers` with weights ten times the usual, so that RoPE matters; saved to `folder`."""
    torch.manual_seed(0)
    config.initializer_range = 0.2
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder, **options)
    return model


def relative(ours, expected):
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_are_those_of_transformers(kind, tmp_path):
    expected, ids = oracle(KINDS[kind], tmp_path), torch.randint(300, (2, 300))
    assert relative(Checkpoint(tmp_path).model()(ids), expected(ids).logits) < 1e-4


@torch.inference_mode()
def test_sharded_folder_loads_like_a_single_file(tmp_path):
    expected, ids = oracle(KINDS["llama-3"], tmp_path, max_shard_size="100KB"), torch.randint(300, (1, 50))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert relative(Checkpoint(tmp_path).model()(ids), expected(ids).logits) < 1e-4


@torch.inference_mode()
def test_a_head_in_the_files_is_used_whatever_the_config_says(tmp_path):
    expected, ids = oracle(KINDS["llama-3"], tmp_path), torch.randint(300, (1, 50))
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    edit_config(tmp_path, tie_word_embeddings=True)
    assert relative(Checkpoint(tmp_path).model()(ids), expected(ids).logits) < 1e-4


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items()}},
        {"rope_theta": 5e5, "rope_scaling": None},
    ],
)
@torch.inference_mode()
def test_rope_settings_of_older_config_files_are_found(old, tmp_path):
    scaled = old["rope_scaling"] is not None
    expected, ids = oracle(KINDS["llama-3.1" if scaled else "llama-3"], tmp_path), torch.randint(300, (1, 300))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    assert relative(Checkpoint(tmp_path).model()(ids), expected(ids).logits) < 1e-4


@torch.inference_mode()
def test_cached_steps_give_the_logits_of_one_pass(tmp_path):
    oracle(KINDS["llama-3.2"], tmp_path)
    model, ids = Checkpoint(tmp_path).model(), torch.randint(300, (2, 40))
    caches = [KVCache(model.config, 2, 40, model.model.norm.weight) for _ in model.model.layers]
    parts = [model(part, caches) for part in ids.split((20, 1, 1, 17, 1), dim=1)]  # one token at a time and several
    assert relative(torch.cat(parts, 1), model(ids)) < 1e-5


def test_generate_continues_as_transformers_does(tmp_path):
    expected, ids = oracle(KINDS["smollm2"], tmp_path), torch.randint(300, (1, 20))
    theirs = expected.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(Checkpoint(tmp_path).model().generate(ids, 30), theirs)


def test_context_of_mistral_ends_with_its_sliding_window(tmp_path):
    oracle(llama(6, 2, MistralConfig, sliding_window=128), tmp_path)
    assert Checkpoint(tmp_path).config.max_position_embeddings == 128


def test_frequencies_that_old_files_hold_are_computed_anew(toy, tmp_path):
    model = shutil.copytree(toy, tmp_path / "model")
    edit_tensors(model, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    ids = torch.arange(20)[None]
    assert torch.equal(Checkpoint(model).model()(ids), Checkpoint(toy).model()(ids))
