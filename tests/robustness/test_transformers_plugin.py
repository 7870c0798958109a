"""A packed folder opens in transformers as it is."""

import shutil

import pytest
import torch
from helpers import call
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import calibrate
import support.transformers_plugin  # noqa: F401 (registers the format)
from kernel import BCQLinear
from support.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def packed(toy, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin") / "packed"
    options = ["--method", "bcq", "--group-size", 32, "--samples", 4, "--no-baselines"]
    assert call(calibrate.main, "--model", toy, "--text", text, "--out", folder, *options).code == 0
    return folder


@torch.inference_mode()
def test_logits_are_ours_and_saving_keeps_them(packed, tmp_path):
    ids = torch.randint(2048, (2, 50))
    expected = Checkpoint(packed).model()(ids)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)
    torch.testing.assert_close(Checkpoint(tmp_path).model()(ids), expected, rtol=1e-4, atol=1e-4)


def test_every_linear_layer_is_bit_planes_whatever_dtype_is_asked_for(packed, tmp_path):
    """The rest of the model may be stored in fp16, like the scales."""
    for shard in shutil.copytree(packed, tmp_path / "packed").glob("*.safetensors"):
        tensors = {name: t.half() if name.endswith("weight") else t for name, t in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    ours = Checkpoint(packed).model()
    for folder in (packed, tmp_path / "packed"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, BCQLinear)}
        assert len(layers) == 14
        for name, layer in layers.items():
            for key, stored in ours.get_submodule(name).named_buffers():
                found = layer.get_buffer(key)
                assert found.dtype == stored.dtype and torch.equal(found, stored), (name, key)
        assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16


def test_it_generates_as_ours_does(packed):
    ids = torch.tensor([[1, 2, 3, 4]])
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    theirs = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(theirs, Checkpoint(packed).model().generate(ids, 20))
