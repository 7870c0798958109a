"""The step that a GPU records as a CUDA graph, on a CPU: it means the same, and is the same from token to token."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.kernels import random_layer
from llama import KVCache, Llama, LlamaConfig, linears, rope_tables
from support.graph import fixed_step
from support.stack import stack_layers

ROOM = 40  # tokens
SHAPE = dict(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)


class Recording(TorchDispatchMode):
    """A CUDA graph on a CPU: every operation is repeated on the very tensors, that is addresses, it had at first."""

    def __init__(self, step):
        super().__init__()
        self.calls = []
        with self:
            self.result = step()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), "it waits"
        result = function(*arguments, **(named or {}))
        self.calls.append((function, arguments, named or {}, result))
        return result

    def __call__(self):
        for function, arguments, named, before in self.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(function(*arguments, **named))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.result


def a_model(packed=False, stacked=False, **options) -> Llama:
    """A random Llama whose logits differ by more than rounding."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SHAPE, **options))
    for tensor in model.parameters():
        tensor.data.normal_(0, 0.3)
    for name, linear in linears(model.model).items() if packed else ():
        layer = random_layer(linear.out_features, linear.in_features, 3, 32)
        layer.alpha /= 4
        layer.shift /= 16
        model.model.set_submodule(name, layer)
    return stack_layers(model) if stacked else model


MODELS = {
    "plain": dict(),
    "packed": dict(packed=True),
    "packed, stacked": dict(packed=True, stacked=True),
    "grouped heads, in part without RoPE": dict(num_key_value_heads=2, layers_without_rope=(1,), qk_norm=True),
}


@pytest.mark.parametrize("record", [None, Recording], ids=["as it is", "recorded"])
@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_fixed_steps_give_the_logits_of_plain_steps(kind, record):
    model, ids = a_model(**MODELS[kind]), torch.randint(100, (2, ROOM))
    rope = rope_tables(model.config, ROOM)
    caches = [KVCache(model.config, 2, ROOM, model.model.norm.weight) for _ in model.model.layers]
    for cache in caches:
        cache.keys.fill_(torch.nan)  # what fresh memory may hold
        cache.values.fill_(torch.nan)

    model(ids[:, :20], caches, rope)
    step = fixed_step(model, caches, rope, record)
    logits = torch.cat([step(ids[:, i : i + 1]) for i in range(20, ROOM)], dim=1)
    expected = model(ids)[:, 20:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("record", [None, Recording], ids=["as it is", "recorded"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_text_of_fixed_steps_is_that_of_plain_steps(kind, record):
    model, ids = a_model(**MODELS[kind]), torch.randint(100, (3, 7))
    fixed = model.generate(ids, 30, make_step=partial(fixed_step, record=record))
    plain = model.generate(ids, 30)
    assert torch.equal(fixed, plain) and plain[:, 7:].unique().numel() > 3


def test_the_logits_of_a_step_are_not_written_over_by_the_next():
    shown = []

    def choose(logits):
        shown.append((logits, logits.clone()))
        return logits.max(-1, keepdim=True).indices

    a_model().generate(torch.zeros(1, 3, dtype=torch.int64), 5, (), choose, partial(fixed_step, record=Recording))
    assert len(shown) == 5 and all(torch.equal(*pair) for pair in shown)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", MODELS)
def test_a_cuda_graph_writes_what_plain_steps_write(kind):
    model = a_model(**MODELS[kind]).cuda()
    ids = torch.randint(100, (3, 7), device="cuda")
    assert torch.equal(model.generate(ids, 30, make_step=fixed_step), model.generate(ids, 30))
