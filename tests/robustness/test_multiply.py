"""Products straight from bit-planes, on every path of this machine, against float64 from the unpacked bits."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import call

import kernel
from experiments import kernels
from experiments.kernels import random_layer
from kernel import BCQLinear, backends, library

GPU_PATHS = ("cuda", "fast", "readable")
WIDE = {"AVX2": ["avx2"], "AVX512": ["avx512", "avx2"]}.get(torch.backends.cpu.get_cpu_capability(), [])
PATHS = [*WIDE, "scalar", "emulated"] + list(GPU_PATHS) * torch.cuda.is_available()
CASES = [  # out_features, in_features, n_bits, group_size
    (1, 32, 1, 32), (31, 96, 8, 32), (33, 576, 3, 64), (40, 576, 2, 192), (1000, 576, 3, -1), (64, 1536, 5, 128),
    (96, 1536, 4, 128), (32, 4096, 7, 128), (70, 4096, 6, -1), (128, 1536, 3, 128), (128, 4096, 2, -1),
]  # fmt: skip


def product(layer: BCQLinear, x: torch.Tensor, path: str) -> torch.Tensor:
    """By one path, past `BCQLinear.forward`."""
    return library().multiply(x, layer.bit_planes, layer.alpha, layer.shift, layer.out_features, path)


def exact(layer: BCQLinear, x: torch.Tensor) -> torch.Tensor:
    return x.double() @ layer.dequantize().double().T


@pytest.fixture(params=PATHS)
def path(request) -> str:
    if request.param not in backends("cuda" if request.param in GPU_PATHS else "cpu"):
        pytest.skip(f"no compiler here makes {request.param}")
    return request.param


def random_case(path, out_features, in_features, n_bits, group_size, batch, dtype=torch.float32):
    """A layer and an input on the device of the path; the case is skipped where the fast kernel does not take it."""
    torch.manual_seed(out_features * 10 + batch)
    device = "cuda" if path in GPU_PATHS else "cpu"
    size = in_features if group_size == -1 else group_size
    if path == "fast" and (n_bits > 4 or size % 128 or dtype == torch.float32):
        pytest.skip("the fast kernel takes 1 to 4 bits, groups of multiples of 128, fp16 and bf16")
    layer = random_layer(out_features, in_features, n_bits, group_size, device)
    return layer, torch.randn(batch, in_features, device=device).to(dtype)


def error(found: torch.Tensor, layer: BCQLinear, x: torch.Tensor) -> float:
    """The largest error, relative to the largest sum of absolute values of a row."""
    return float((found - exact(layer, x)).abs().max() / (x.double().abs() @ layer.dequantize().double().abs().T).max())


@pytest.mark.parametrize("batch", (1, 3, 8))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_product_is_that_of_the_unpacked_bits(path, case, batch):
    layer, x = random_case(path, *case, batch, torch.float16 if path == "fast" else torch.float32)
    assert error(product(layer, x, path), layer, x) < (1e-3 if path == "fast" else 1e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_every_dtype_is_taken_and_returned(path, dtype):
    layer, x = random_case(path, 96, 1536, 3, 128, 2, dtype)
    y = product(layer, x, path)
    assert y.dtype == dtype
    assert error(y, layer, x) < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def test_unit_vectors_read_out_the_weight(path):
    layer, _ = random_case(path, 64, 256, 3, 128, 8, torch.float16)
    columns = torch.eye(256, device=layer.shift.device, dtype=torch.float16)
    found = torch.cat([product(layer, part, path) for part in columns.split(8)]).T
    torch.testing.assert_close(found.float(), layer.dequantize(), rtol=2e-3, atol=2e-3)


def test_an_outlier_in_x_costs_no_more_than_its_own_rounding(path):
    layer, x = random_case(path, 96, 1536, 3, 128, 4, torch.bfloat16 if path == "fast" else torch.float32)
    x[:, 7] = 1e4
    assert error(product(layer, x, path), layer, x) < (8e-3 if path == "fast" else 1e-6)


def test_strided_x_gives_the_same_as_contiguous(path):
    layer, x = random_case(path, 96, 1536, 3, 128, 8, torch.float16)
    wide = torch.stack((x, torch.full_like(x, torch.nan)), dim=2)
    assert torch.equal(product(layer, wide[..., 0], path), product(layer, x, path))


def test_runs_agree_to_the_last_bit_and_so_does_a_row_alone(path):
    layer, x = random_case(path, 1000, 1536, 3, 128, 8, torch.float16)
    y = product(layer, x, path)
    assert torch.equal(y, product(layer, x, path))
    for row in range(8):
        assert torch.equal(y[row], product(layer, x[row], path))


def test_a_later_call_leaves_an_earlier_result_alone(path):
    layer, x = random_case(path, 96, 1536, 3, 128, 2, torch.float16)
    y = product(layer, x, path)
    kept = y.clone()
    product(layer, 2 * x, path)
    assert torch.equal(y, kept)


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_the_number_of_threads_changes_nothing(threads):
    layer, x = random_case("cpu", 1000, 576, 3, 64, 2)
    expected, before = layer(x), torch.get_num_threads()
    torch.set_num_threads(threads)
    found = layer(x)
    torch.set_num_threads(before)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("batch", (0, 1, 8, 9))
def test_forward_agrees_with_the_dequantized_weight_for_any_number_of_tokens(batch):
    layer, x = random_case("cpu", 70, 576, 3, 64, batch)
    assert layer(x.view(batch, 1, 576)).shape == (batch, 1, 70)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-4, atol=1e-3)


def test_gradients_with_respect_to_x_are_those_of_the_dequantized_weight():
    layer, x = random_case("cpu", 64, 96, 3, 32, 2)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, -1))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.randn(2, 64)), "x has 64 columns, the bit-planes have 96"),
        (dict(x=torch.ones(2, 96, dtype=torch.int32)), "x is Int"),
        (dict(x=torch.randn(9, 96)), "9 rows of x: 1 to 8"),
        (dict(x=torch.randn(2, 96, device="meta")), "x is on meta, the weight on cpu"),
        (dict(bit_planes=torch.zeros(3, 3, 3, 32, dtype=torch.int32)), "hold 3 tiles of 32 rows, 40 rows need 2"),
        (dict(bit_planes=torch.zeros(9, 2, 3, 32, dtype=torch.int32)), "9 bit-planes"),
        (dict(bit_planes=torch.zeros(3, 2, 3, 32)), "are Float, Half, Half, expected int32"),
        (dict(alpha=torch.zeros(2, 2, 3, 32).half()), r"alpha is \[2, 2, 3, 32\], expected \[3, 2, 3, 32\]"),
        (dict(alpha=torch.zeros(3, 2, 2, 32).half()), "2 groups do not divide 3 words"),
        (dict(shift=torch.zeros(2, 1, 32).half()), r"shift is \[2, 1, 32\], expected \[2, 3, 32\]"),
        (dict(shift=torch.zeros(2, 3, 32)), "are Int, Half, Float, expected int32"),
        (dict(shift=torch.zeros(2, 32, 3).half().mT), "must be contiguous"),
        (dict(path="abacus"), "no path called abacus"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    if library() is None:
        pytest.skip("no compiler")
    layer = random_layer(40, 96, 3, 32)
    given = dict(x=torch.randn(2, 96), bit_planes=layer.bit_planes, alpha=layer.alpha, shift=layer.shift)
    given |= dict(out_features=40, path="scalar") | change
    with pytest.raises(ValueError, match=message):
        library().multiply(*given.values())


def test_an_x_of_another_width_is_refused_by_the_layer():
    with pytest.raises(ValueError, match="x has 64 columns, the weight has in_features 96"):
        random_layer(40, 96, 3, 32)(torch.randn(2, 64))


@pytest.fixture
def afresh():
    """What the machine offers is found out again, in this test and after it."""

    def clear():
        library.cache_clear()
        backends.cache_clear()

    yield clear
    clear()


def test_an_environment_variable_forces_a_path(afresh, monkeypatch):
    for name in ("torch", "scalar") if library() else ("torch",):
        monkeypatch.setenv("FLEXBCQ_KERNEL", name)
        backends.cache_clear()
        assert backends("cpu") == [name]
    monkeypatch.setenv("FLEXBCQ_KERNEL", "abacus")
    backends.cache_clear()
    with pytest.raises(ValueError, match="FLEXBCQ_KERNEL=abacus: this machine offers .*torch"):
        backends("cpu")


def test_a_lock_that_a_killed_process_left_is_not_waited_for(afresh):
    assert kernel.library() is not None
    (kernel.BUILD / "lock").touch()
    afresh()
    assert kernel.library() is not None


def test_what_a_compiler_complains_of_is_said(afresh, monkeypatch, capfd, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\nfor x; do [ $x = -c ] && echo 'a.cpp:1: error: not today' && exit 1; done; c++ \"$@\""
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(kernel, "BUILD", tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    afresh()
    assert backends("cpu") == ["torch"]
    assert capfd.readouterr().err.endswith("no compiled kernels (a.cpp:1: error: not today): on with plain PyTorch\n")


def test_without_a_compiler_one_line_is_said_and_plain_pytorch_runs(afresh, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(kernel, "BUILD", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    afresh()
    layer, x = random_case("cpu", 40, 96, 3, 32, 2)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T)
    assert backends("cpu") == ["torch"]
    assert capfd.readouterr().err == "no compiled kernels (no C++ compiler is installed): on with plain PyTorch\n"


def test_benchmark_writes_its_table_and_its_plot(tmp_path):
    result = call(kernels.main, "--shapes", "64x128", "--bits", 3, "--batch", 1, "--rounds", 2, "--out", tmp_path / "b")
    assert result.code == 0 and "| 64 x 128 | 3 | 1 |" in result.out
    assert (tmp_path / "b.md").read_text() == result.out[:-1] and (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shapes", "64"], "argument --shapes: invalid rows_x_columns value: '64'"),
        (["--bits", 9], "9 bits: choose 1 to 8"),
        (["--shapes", "64x100"], "in_features 100 cannot be cut into groups of 128"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_benchmark_refuses_in_one_line(arguments, message, tmp_path):
    result = call(kernels.main, *arguments, "--out", tmp_path / "b")
    assert result.code == 2 and message in result.err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_sanitizers_have_nothing_to_say(tmp_path):
    """Every CPU path on odd shapes, compiled so that reads past an end and undefined behaviour abort the process."""
    if library() is None:
        pytest.skip("no compiler")
    code = f"""
import torch
from torch.utils.cpp_extension import load
from experiments.kernels import random_layer
from kernel import library
flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-tree-ter", "-Wno-psabi"]
checked = load("checked", ["kernel.cpp"], build_directory={str(tmp_path)!r}, extra_cflags=flags, extra_ldflags=flags)
for path in checked.cpu_paths():
    for out, width, n_bits, size in {[case for case in CASES if case[0] < 100]}:
        layer = random_layer(out, width, n_bits, size)
        x = torch.randn(3, width)
        arguments = x, layer.bit_planes, layer.alpha, layer.shift, out, path
        assert torch.allclose(checked.multiply(*arguments), library().multiply(*arguments), rtol=1e-4, atol=1e-3)
print("clean")
"""
    find = ["g++", "-print-file-name=libasan.so", "-print-file-name=libstdc++.so"]
    found = [subprocess.run([find[0], what], capture_output=True, text=True).stdout.strip() for what in find[1:]]
    environment = os.environ | {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    here = os.path.dirname(kernel.__file__)
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=here, capture_output=True, text=True)
    assert result.stdout.endswith("clean\n"), result.stderr[-2000:]
