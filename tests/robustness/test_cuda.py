"""kernel.cu, compiled by g++ for this CPU (tests/cuda_on_cpu.h) and for a GPU if there is one, against float64 and
against itself.

The cases need nothing but `multiply(path, layer, x) -> y`: a fixture, so that they run wherever one can be had.
"""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kernel import BCQLinear, from_tiles, library, unpack

ROOT = Path(__file__).parent.parent.parent
AUTO, READABLE, FAST = range(3)
TYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of kernel.cu
READABLE_SHAPES = [  # out_features, in_features, group_size
    (1, 32, 32), (31, 64, 32), (33, 576, 64), (40, 192, 96), (1000, 64, 64), (33, 576, 192), (40, 1536, 128),
    (32, 1536, 1536), (1, 4096, 4096),
]  # fmt: skip
FAST_SHAPES = [
    (1, 128, 128), (31, 256, 128), (33, 1536, 128), (40, 768, 384), (1000, 128, 128), (32, 1536, 1536), (1, 4096, 128),
]  # fmt: skip
READABLE_CASES = [(READABLE, n, *shape) for n, shape in itertools.product(range(1, 9), READABLE_SHAPES)]
FAST_CASES = [(FAST, n, *shape) for n, shape in itertools.product(range(1, 5), FAST_SHAPES)]
BOTH = [(READABLE, 3, 40, 1536, 64), (FAST, 3, 40, 1536, 128), (FAST, 4, 40, 1536, 768)]

MAIN = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
extern "C" size_t bcq_matmul_workspace_bytes(int);
extern "C" const char* bcq_matmul_cuda(const void*, const void*, const void*, const void*, void*, void*, int, int, int,
                                       int, int, int, int, void*);
std::vector<char> read(const char* bytes) {  // of exactly this size, so that the sanitizer sees a step past its end
    std::vector<char> data(std::atoi(bytes));
    if (std::fread(data.data(), 1, data.size(), stdin) != data.size()) std::abort();
    return data;
}
int main(int, char** argument) {
    auto planes = read(argument[1]), alpha = read(argument[2]), shift = read(argument[3]), x = read(argument[4]);
    int n[7];
    for (int i = 0; i < 7; i++) n[i] = std::atoi(argument[6 + i]);
    std::vector<char> y(std::atoi(argument[5])), workspace(bcq_matmul_workspace_bytes(n[2]));
    const char* error = bcq_matmul_cuda(planes.data(), alpha.data(), shift.data(), x.data(), y.data(),
                                        workspace.data(), n[0], n[1], n[2], n[3], n[4], n[5], n[6], nullptr);
    if (error) std::fputs(error, stderr);
    std::fwrite(y.data(), 1, y.size(), stdout);
    return error != nullptr;
}
"""


def compile_for_cpu(output: Path, *arguments: str) -> None:
    """g++ with kernel.cu and the header that stands in for CUDA. Skips the test where there is no g++."""
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile kernel.cu with")
    command = ["g++", "-std=c++17", "-O1", "-g", "-fno-strict-aliasing", *arguments]
    command += ["-x", "c++", "-include", ROOT / "tests/robustness/cuda_on_cpu.h", ROOT / "kernel.cu", "-o", output]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def numbers(path: int, layer: BCQLinear, x: torch.Tensor) -> list[int]:
    """The integers that bcq_matmul_cuda takes after the workspace, in its order."""
    sizes = len(x), layer.in_features, layer.out_features, layer.n_bits, layer.group_size
    return [TYPES.index(x.dtype), *sizes, path]


@pytest.fixture(scope="session")
def multiply_on_cpu(tmp_path_factory):
    output = tmp_path_factory.mktemp("cuda") / "kernel.so"
    compile_for_cpu(output, "-shared", "-fPIC")
    compiled = ctypes.CDLL(str(output))
    compiled.bcq_matmul_cuda.restype = ctypes.c_char_p
    compiled.bcq_matmul_workspace_bytes.restype = ctypes.c_size_t

    def multiply(path, layer, x):
        size = len(x) * layer.out_features
        y = torch.full((size + 64,), torch.nan, dtype=x.dtype)
        workspace = torch.full((compiled.bcq_matmul_workspace_bytes(layer.in_features),), 255, dtype=torch.uint8)
        tensors = layer.bit_planes, layer.alpha, layer.shift, x, y, workspace
        error = compiled.bcq_matmul_cuda(
            *(ctypes.c_void_p(t.data_ptr()) for t in tensors), *numbers(path, layer, x), None
        )
        if error:
            raise ValueError(error.decode())
        assert y[size:].isnan().all(), "written past the end of y"
        return y[:size].view(len(x), -1)

    return multiply


@pytest.fixture(scope="session")
def multiply_on_gpu():
    def multiply(path, layer, x):
        tensors = (t.cuda() for t in (x, *layer.buffers()))  # bit_planes, alpha, shift
        return library().multiply(*tensors, layer.out_features, ("cuda", "readable", "fast")[path]).cpu()

    return multiply


@pytest.fixture(params=["cpu"] + ["gpu"] * torch.cuda.is_available())
def multiply(request):
    return request.getfixturevalue(f"multiply_on_{request.param}")


def random_layer(n_bits, out_features, in_features, group_size):
    groups = in_features // group_size
    codes = torch.randint(2**n_bits, (out_features, in_features)).to(torch.uint8)
    alpha, shift = torch.rand(out_features, groups, n_bits) / 8, torch.randn(out_features, groups) / 8
    return BCQLinear.from_codes(codes, alpha, shift)


def weight(layer):
    """(out, in) float64, from the bits."""

    def per_weight(x):
        return from_tiles(x, layer.out_features).double().repeat_interleave(layer.group_size, dim=1)

    codes, total = unpack(layer.bit_planes, layer.out_features), per_weight(layer.shift)
    for i, alpha in enumerate(layer.alpha):
        total += (2.0 * (codes >> (layer.n_bits - 1 - i) & 1) - 1) * per_weight(alpha)
    return total


def assert_right(y, layer, x):
    """Up to the rounding of y, and 1e-6 of the largest |x| times every |w|."""
    w, x = weight(layer), x.double()
    exact = x @ w.T
    allowed = torch.finfo(y.dtype).eps * exact.abs() + 1e-6 * x.abs().amax(1, keepdim=True) * w.abs().sum(1)
    excess = (y.double() - exact).abs() / allowed
    assert not y.isnan().any() and excess.max() <= 1, f"{excess.max():.1f} times the allowed error"


@pytest.mark.parametrize("path, n_bits, out_features, in_features, group_size", READABLE_CASES + FAST_CASES)
def test_the_kernels_agree_with_float64(multiply, path, n_bits, out_features, in_features, group_size):
    layer = random_layer(n_bits, out_features, in_features, group_size)
    batch = 1 + (n_bits + in_features // 32 + out_features) % 8
    for dtype in TYPES[path == FAST :]:
        x = torch.randn(batch, in_features).to(dtype)
        assert_right(multiply(path, layer, x), layer, x)


@pytest.mark.parametrize(
    "path, n_bits, in_features", [(READABLE, 8, 96), (READABLE, 3, 96), (FAST, 3, 256), (FAST, 4, 256)]
)
def test_a_unit_vector_reads_its_column(multiply, path, n_bits, in_features):
    layer = random_layer(n_bits, 40, in_features, 32 if path == READABLE else 128)
    for x in torch.eye(in_features, dtype=torch.float16).split(8):
        torch.testing.assert_close(
            multiply(path, layer, x).double(), x.double() @ weight(layer).T, rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("case", BOTH)
def test_a_row_of_a_batch_is_bitwise_the_row_alone(multiply, case):
    layer, x = random_layer(*case[1:]), torch.randn(8, case[3]).half()
    rows = torch.cat([multiply(case[0], layer, row[None]) for row in x])
    for batch in range(1, 9):
        assert torch.equal(multiply(case[0], layer, x[:batch]), rows[:batch])


@pytest.mark.parametrize("case", BOTH)
def test_two_runs_agree_bitwise(multiply, case):
    layer, x = random_layer(*case[1:]), torch.randn(5, case[3]).half()
    assert torch.equal(multiply(case[0], layer, x), multiply(case[0], layer, x))


@pytest.mark.parametrize("case, dtype", list(itertools.product(BOTH, TYPES[1:])))
def test_an_outlier_in_x_does_no_harm(multiply, case, dtype):
    layer, x = random_layer(*case[1:]), torch.randn(2, case[3])
    x[0, 77] = 1e4
    x = x.to(dtype)
    assert_right(multiply(case[0], layer, x), layer, x)


@pytest.mark.parametrize("case, exponent", list(itertools.product(BOTH, (-60, 60))))
def test_x_times_a_power_of_two_gives_y_times_that_power(multiply, case, exponent):
    layer, x = random_layer(*case[1:]), torch.randn(2, case[3]).bfloat16()
    assert torch.equal(multiply(case[0], layer, x * 2.0**exponent), multiply(case[0], layer, x) * 2.0**exponent)


@pytest.mark.parametrize("case", BOTH)
def test_zeros_give_zero_and_nan_stays_in_its_row(multiply, case):
    layer, x = random_layer(*case[1:]), torch.zeros(3, case[3]).half()
    x[1, 5] = torch.nan
    y = multiply(case[0], layer, x)
    assert (y[[0, 2]] == 0).all() and y[1].isnan().all()


def test_auto_is_fast_where_it_can_be_and_readable_elsewhere(multiply):
    for n_bits, group_size, dtype, path in [
        (3, 128, torch.float16, FAST), (3, 128, torch.float32, READABLE),
        (5, 128, torch.float16, READABLE), (3, 64, torch.float16, READABLE),
    ]:  # fmt: skip
        layer, x = random_layer(n_bits, 32, 384, group_size), torch.randn(2, 384).to(dtype)
        assert torch.equal(multiply(AUTO, layer, x), multiply(path, layer, x))
        if path == READABLE:
            with pytest.raises(ValueError, match="fast kernel does not take"):
                multiply(FAST, layer, x)


def test_a_batch_of_nine_is_refused(multiply):
    with pytest.raises(ValueError, match="(batch is not|rows of x:) 1 to 8"):
        multiply(AUTO, random_layer(3, 32, 128, 128), torch.randn(9, 128))


def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path):
    (tmp_path / "main.cpp").write_text(MAIN)
    program, options = tmp_path / "main", ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    compile_for_cpu(program, *options, str(tmp_path / "main.cpp"))
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    for case in [
        (READABLE, 3, 33, 96, 32),
        (READABLE, 8, 31, 192, 192),
        (FAST, 3, 33, 384, 128),
        (FAST, 4, 1, 256, 256),
    ]:
        layer, x = random_layer(*case[1:]), torch.randn(3, case[3]).half()
        tensors = [t.contiguous().view(-1).view(torch.uint8) for t in (layer.bit_planes, layer.alpha, layer.shift, x)]
        sizes = [len(t) for t in tensors] + [x.element_size() * len(x) * layer.out_features]
        command = [program, *map(str, sizes + numbers(case[0], layer, x))]
        data = b"".join(t.numpy().tobytes() for t in tensors)
        run = subprocess.run(command, input=data, capture_output=True, env=environment)
        assert run.returncode == 0, run.stderr.decode()
        assert_right(torch.frombuffer(bytearray(run.stdout), dtype=x.dtype).view(len(x), -1), layer, x)


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_nvcc_keeps_everything_in_registers(arch, tmp_path):
    """80 registers for the 24 warps an SM should hold, 128 for the 16 at 4 bits; and nothing spilled."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc to compile kernel.cu with")
    command = ["nvcc", "-c", f"-arch={arch}", "-Xptxas", "-v", ROOT / "kernel.cu", "-o", tmp_path / "kernel.o"]
    report = subprocess.run(command, capture_output=True, text=True).stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill.*?Used (\d+) registers", report, re.S)
    assert len(kernels) == 21, report
    for name, spilled, registers in kernels:
        fast = re.match(r"_Z11fast_kernelILi(\d)", name)
        assert spilled == "0" and int(registers) <= (80 if fast and fast[1] < "4" else 128), (name, spilled, registers)
