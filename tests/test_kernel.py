"""Bit-planes: layout, round trips, BCQLinear."""

import itertools

import pytest
import torch

from kernel import BCQEmbedding, BCQLinear, bits_per_weight, columns_per_group, from_tiles, pack, to_tiles, unpack

SHAPES = [(1, 32), (31, 64), (32, 96), (33, 192), (70, 576)]


def random_codes(out, width, n_bits):
    return torch.randint(2**n_bits, (out, width)).to(torch.uint8)


def random_parts(out, width, n_bits, group_size):
    """codes, alpha and shift of a layer; alpha and shift exact in fp16."""
    groups = width // group_size
    return (
        random_codes(out, width, n_bits),
        torch.rand(out, groups, n_bits).half().float(),
        torch.randn(out, groups).half().float(),
    )


@pytest.mark.parametrize("n_bits, shape", list(itertools.product(range(1, 9), SHAPES)))
def test_unpack_reverses_pack(n_bits, shape):
    codes = random_codes(*shape, n_bits)
    assert torch.equal(unpack(pack(codes, n_bits), shape[0]), codes)


def test_layout_is_the_one_the_docstring_states():
    codes = random_codes(40, 96, 3)
    planes = pack(codes, 3)
    assert planes.shape == (3, 2, 3, 32) and planes.dtype == torch.int32
    for i, row, column in itertools.product(range(3), range(64), range(96)):
        word = int(planes[i, row // 32, column // 32, row % 32])
        expected = int(codes[row, column]) >> (2 - i) & 1 if row < 40 else 0
        assert word >> (column % 32) & 1 == expected


def test_from_tiles_reverses_to_tiles():
    x = torch.randn(45, 3, 2)
    assert to_tiles(x).shape == (2, 3, 2, 32)
    assert torch.equal(from_tiles(to_tiles(x), 45), x)


@pytest.mark.parametrize("n_bits, shape, group_size", list(itertools.product(range(1, 9), SHAPES, (32, -1))))
def test_bcq_linear_multiplies_with_the_sum_over_planes(n_bits, shape, group_size):
    out, width = shape
    size = columns_per_group(width, group_size)
    codes, alpha, shift = random_parts(out, width, n_bits, size)
    weight = shift.double().repeat_interleave(size, 1)
    for i in range(n_bits):
        sign = ((codes >> (n_bits - 1 - i)) & 1).double() * 2 - 1
        weight += sign * alpha[:, :, i].double().repeat_interleave(size, 1)
    layer, x = BCQLinear.from_codes(codes, alpha, shift), torch.randn(2, 5, width)
    torch.testing.assert_close(layer.dequantize().double(), weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_bits, shape, ids_shape", [(3, (257, 128), (2, 5)), (8, (70, 64), (33,)), (1, (32, 32), ())])
def test_rows_looked_up_are_those_of_the_weight(n_bits, shape, ids_shape):
    layer = BCQEmbedding.from_codes(*random_parts(*shape, n_bits, 32))
    ids = torch.randint(shape[0], ids_shape)
    assert torch.equal(layer(ids), layer.dequantize()[ids])
    last = torch.tensor([shape[0] - 1, 0])
    assert torch.equal(layer(last), layer.dequantize()[last])


def test_state_dict_round_trip_into_an_empty_layer():
    layer = BCQLinear.from_codes(*random_parts(33, 192, 3, 64))
    empty = BCQLinear(192, 33, 3, 64)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.dequantize(), layer.dequantize())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_output_has_the_dtype_of_the_input(dtype):
    layer, x = BCQLinear.from_codes(*random_parts(32, 64, 2, 32)), torch.randn(3, 64)
    assert layer(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(layer(x.to(dtype)).float(), layer(x), rtol=0.02, atol=0.2)


def test_bits_per_weight_counts_what_is_stored():
    layer = BCQLinear(256, 64, 3, 128)
    stored = sum(8 * t.numel() * t.element_size() for t in layer.state_dict().values())
    assert stored / (256 * 64) == bits_per_weight(3, 128) == 3.5


@pytest.mark.parametrize(
    "width, group_size", [(96, 64), (96, 0), (96, -2), (96, 16), (96, 192), (100, 50), (100, -1), (0, -1)]
)
def test_group_sizes_that_do_not_fit_are_refused(width, group_size):
    with pytest.raises(ValueError, match=f"in_features {width}"):
        columns_per_group(width, group_size)


def test_codes_and_alphas_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit into 2 bits"):
        pack(torch.full((4, 32), 4, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="multiple of 32"):
        pack(torch.zeros(4, 40, dtype=torch.uint8), 2)
    codes, alpha, shift = random_parts(4, 32, 2, 32)
    with pytest.raises(ValueError, match="fp16"):
        BCQLinear.from_codes(codes, alpha * 1e6, shift)
