"""What a GPU would do, as far as it shows without one: what it is asked for, and how often it is waited for."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from calibrate import (
    CHECK_EVERY,
    check_finite,
    first_activations,
    quantize_layers,
    run_block,
    train_block,
)
from flexbcq import levels
from llama import Attention, LlamaConfig, rope_tables
from support.checkpoint import Checkpoint
from support.command import coarse_products
from support.settings import Settings

GROUPED = LlamaConfig(64, 64, 96, 1, num_attention_heads=4, num_key_value_heads=2)


class OnAGpu(torch.Tensor):
    """A tensor on the CPU that says it is elsewhere."""

    is_cuda = True


# ------------------------------------------------------------------------------------------------------------- training


class Reads(TorchDispatchMode):
    """Counts how often the host asks for a number, for which it must wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return function(*arguments, **(named or {}))


def test_training_waits_for_the_device_once_in_many_steps(toy):
    checkpoint, cpu = Checkpoint(toy), torch.device("cpu")
    settings = Settings(model=toy, bits=2, group_size=32, samples=4, epochs=30, batch_size=2, device=cpu)
    x = first_activations(checkpoint, torch.randint(2048, (4, 16)), settings)
    block = checkpoint.block(0)
    run_block(block, x.original, x.rope, out=x.target)
    quantizers = quantize_layers(checkpoint, block, 0, settings)

    with Reads() as reads:
        train_block(block, list(quantizers.values()), x, settings, seed=0)
    assert settings.n_steps == 60 > CHECK_EVERY and reads.count <= 3


def test_the_first_loss_that_is_not_finite_is_named():
    check_finite(torch.zeros(3))
    with pytest.raises(ValueError, match="the loss is inf at step 1"):
        check_finite(torch.tensor([1.0, torch.inf, torch.nan]))


def allowed() -> bool:
    return torch.backends.cuda.matmul.allow_tf32


def test_products_are_coarse_in_training_on_a_gpu_only():
    with coarse_products(torch.device("cpu")):
        assert not allowed()
    with pytest.raises(ValueError), coarse_products(torch.device("cuda")):
        assert allowed()
        raise ValueError
    assert not allowed()


def test_levels_do_not_depend_on_the_precision_of_products():
    alpha, shift = torch.randn(50, 3), torch.randn(50, 1)
    with torch.autocast("cpu", torch.bfloat16):  # rounds the factors of a product, as TF32 does
        found = levels(alpha.as_subclass(OnAGpu), shift).as_subclass(torch.Tensor)
    torch.testing.assert_close(found, levels(alpha, shift), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ attention


class Asked(TorchFunctionMode):
    """Keeps what attention is asked for: the heads of q and k, and whether they are said to be grouped."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.scaled_dot_product_attention:
            self.heads, self.is_grouped = (arguments[0].shape[1], arguments[1].shape[1]), named["enable_gqa"]
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(
    "where, dtype, heads, is_grouped",
    [
        (OnAGpu, torch.float32, (4, 4), False),  # the fast kernels for float32 know no groups
        (OnAGpu, torch.bfloat16, (4, 2), True),
        (torch.Tensor, torch.float32, (4, 2), True),
    ],
)
def test_attention_asks_a_gpu_for_a_fast_kernel_and_means_the_same(where, dtype, heads, is_grouped):
    attention, x, rope = Attention(GROUPED).to(dtype), torch.randn(2, 5, 64).to(dtype), rope_tables(GROUPED, 5)
    with torch.no_grad(), Asked() as asked:
        y = attention(x.as_subclass(where), *rope)
    assert (asked.heads, asked.is_grouped) == (heads, is_grouped)
    with torch.no_grad():
        torch.testing.assert_close(y.as_subclass(torch.Tensor), attention(x, *rope))
