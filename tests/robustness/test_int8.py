"""The paths of a CPU that round to bytes: what the rounding costs, against float64 (support/cpu/int8.h)."""

import pytest
import torch
from products import assert_right, exact_weight, product
from test_multiply import CASES, WIDE, random_case

from kernel import paths

INT8_PATHS = [f"{name}_int8" for name in (*WIDE, "emulated")]
if not torch.cpu._is_vnni_supported():
    INT8_PATHS = [name for name in INT8_PATHS if name != "avx512_int8"]


@pytest.fixture(params=INT8_PATHS)
def path(request) -> str:
    if request.param not in paths("cpu"):
        pytest.skip(f"no compiler here makes {request.param}")
    return request.param


def off(y: torch.Tensor, layer, x: torch.Tensor) -> torch.Tensor:
    """The error of every product."""
    return y.double() - x.double() @ exact_weight(layer).T


def share(y: torch.Tensor, layer, x: torch.Tensor) -> float:
    """The norm of a token's errors, relative to the norm of its products w * x; of the worst token."""
    products = (x.double() ** 2 @ (exact_weight(layer) ** 2).T).sum(-1).sqrt()
    return float((off(y, layer, x).norm(dim=-1) / products).max())


@pytest.mark.parametrize("tokens", (1, 8, 20))
@pytest.mark.parametrize("case", [case for case in CASES if case[1] in (96, 576, 1536)], ids=str)
def test_a_token_is_off_by_at_most_one_percent(path, case, tokens):
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = random_case("cpu", *case, tokens, dtype)
        y = product(layer, x, path)
        assert y.dtype == dtype and y.isfinite().all()
        assert share(y, layer, x) < (0.01 if case[2] <= 4 else 0.015)


@pytest.mark.parametrize("case", [(70, 1536, 3, 64), (33, 576, 2, 192), (40, 4096, 8, -1)], ids=str)
def test_rounding_to_bytes_costs_no_row_more_than_stated(path, case):
    """x is off by 1/254 of the largest of its word, alpha_i by 1/480 of the sum of |alpha|."""
    layer, x = random_case("cpu", *case, 4, torch.float32)
    x[0] *= 1e-30
    x[1, ::7] *= 1000
    layer.alpha *= torch.randint(0, 2, layer.alpha.shape) * 2 - 1

    def per_weight(t):  # (tiles, groups, 32) -> (out, in)
        return t.movedim(-1, 1).flatten(0, 1)[: case[0]].repeat_interleave(layer.group_size, dim=1)

    words = x.double().unflatten(-1, (-1, 32)).abs()
    x_off = (words.amax(-1, keepdim=True) / 254).expand_as(words).flatten(1)
    total, shift = per_weight(layer.alpha.double().abs().sum(0)), per_weight(layer.shift.double())
    stated = x_off @ (exact_weight(layer) - shift).abs().T + x.double().abs() @ (total * case[2] / 480).T
    assert (off(product(layer, x, path), layer, x).abs() / stated).max() < 1


@pytest.mark.parametrize("n_bits", range(1, 6))
def test_a_uniform_quantizer_is_exact_in_bytes(path, n_bits):
    layer, x = random_case("cpu", 70, 576, n_bits, 64, 8, torch.float32)
    layer.alpha = (layer.alpha[:1] * 2.0 ** -torch.arange(n_bits).view(-1, 1, 1, 1)).half()
    x = x.mul(30).round().clamp(-126, 126)
    x[:, ::32] = 127  # the largest of every word: so x are bytes
    assert_right(product(layer, x, path), layer, x)


def test_rounding_to_bytes_has_no_bias(path):
    layer, x = random_case("cpu", 1000, 576, 3, 64, 1, torch.float32)
    x.fill_(1)
    bias = off(product(layer, x, path), layer, x).mean()
    assert bias.abs() < 3e-4 * exact_weight(layer).abs().sum(1).mean()


def test_bytes_neither_overflow_nor_divide_by_zero(path):
    layer, x = random_case("cpu", 40, 576, 3, 64, 2, torch.float32)
    assert torch.equal(product(layer, torch.zeros_like(x), path), torch.zeros(2, 40))

    for alpha, bits in [(0, 0), (2, -1), (2, 0), (-2, -1), (-2, 0)]:  # all weights at one end of the bytes
        layer.alpha.fill_(alpha)
        layer.bit_planes.fill_(bits)
        x.fill_(3)
        errors, size = off(product(layer, x, path), layer, x), x.double().abs() @ exact_weight(layer).abs().T
        assert (errors.abs() <= 3 / 480 * size).all()
