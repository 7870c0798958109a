"""Layers of one input, multiplied as one: the same numbers from fewer products."""

import copy

import pytest
import torch
from helpers import FEW_STEPS, call
from test_graph import a_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import calibrate
from eval import text_model
from experiments.kernels import random_layer
from kernel import BCQLinear, paths
from support.checkpoint import Checkpoint
from support.stack import stack_layers


class Products(TorchDispatchMode):
    """Counts products with bit-planes."""

    n = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.n += function is torch.ops.flexbcq.multiply.default
        return function(*arguments, **(named or {}))


def size(model) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


SHAPES = {
    "as many heads": dict(),
    "grouped heads": dict(num_key_value_heads=2),
    "norms of heads": dict(num_key_value_heads=2, qk_norm=True),
    "biases": dict(biases=("q_proj", "k_proj", "v_proj")),
}


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_stacked_layers_give_the_same_logits_from_four_products_a_block(shape):
    plain = a_model(packed=True, **SHAPES[shape])
    for name in SHAPES[shape].get("biases", ()):
        for block in plain.model.layers:
            layer = getattr(block.self_attn, name)
            layer.bias = nn.Parameter(torch.randn(layer.out_features))
    stacked = stack_layers(copy.deepcopy(plain))
    assert size(stacked) == size(plain)
    for ids in (torch.tensor([[5]]), torch.randint(100, (2, 3)), torch.randint(100, (1, 50))):
        expected = plain(ids)
        torch.testing.assert_close(stacked(ids), expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    if paths("cpu")[0] != "torch":
        for model, n_products in ((plain, 14), (stacked, 8)):
            with Products() as products:
                model(torch.tensor([[5]]))
            assert products.n == n_products


def test_the_model_that_writes_text_is_stacked(toy, text, tmp_path):
    command = "--method", "rtn", "--no-baselines", "--model", toy, "--text", text, "--out", tmp_path / "out"
    assert call(calibrate.main, *command, *FEW_STEPS).code == 0
    model = text_model(Checkpoint(tmp_path / "out"), torch.device("cpu"))
    for block in model.model.layers:
        assert block.self_attn.qkv.sizes == [64, 32, 32] and block.mlp.gate_up.sizes == [160, 160]
    stack_layers(model)  # once more: nothing is left to stack


def other_bits(block):
    block.self_attn.v_proj = random_layer(64, 64, 2, 32)


def other_groups(block):
    block.self_attn.v_proj = random_layer(64, 64, 3, 64)


def one_bias(block):
    block.self_attn.v_proj.bias = nn.Parameter(torch.ones(64))


def not_packed(block):
    block.self_attn.v_proj = nn.Linear(64, 64)


def padded_rows(block):
    block.self_attn.q_proj = random_layer(40, 64, 3, 32)


@pytest.mark.parametrize("change", [other_bits, other_groups, one_bias, not_packed, padded_rows])
def test_layers_of_different_kinds_stay_apart(change):
    model = a_model(packed=True)
    for block in model.model.layers:
        change(block)
    before = {name: layer for name, layer in model.named_modules() if "attn" in name and isinstance(layer, BCQLinear)}
    stacked = stack_layers(model)
    after = {name: layer for name, layer in stacked.named_modules() if "attn" in name and isinstance(layer, BCQLinear)}
    assert after == before and stacked.model.layers[0].mlp.gate_up is not None
