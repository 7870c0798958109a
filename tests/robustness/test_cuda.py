"""What is special about kernel.cu: which of its kernels runs, its bounds, its registers. That its products are right is
tested with those of all paths, in test_multiply.py."""

import os
import re
import shutil
import subprocess

import pytest
import torch
from products import (
    ROOT,
    TYPES,
    assert_right,
    compile_for_cpu,
    dequantize_by_emulated_cuda,
    multiply_by_emulated_cuda,
    numbers,
    product,
)

from experiments.kernels import random_layer

MAIN = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
extern "C" size_t bcq_matmul_workspace_bytes(int);
extern "C" const char* bcq_matmul_cuda(const void*, const void*, const void*, const void*, void*, void*, int, int, int,
                                       int, int, int, int, void*);
extern "C" const char* bcq_dequantize_cuda(const void*, const void*, const void*, void*, int, int, int, int, int,
                                           void*);
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
    std::vector<char> weight(size_t(n[2]) * n[3] * (n[0] ? 2 : 4));
    bcq_dequantize_cuda(planes.data(), alpha.data(), shift.data(), weight.data(), n[0], n[2], n[3], n[4], n[5],
                        nullptr);
    if (error) std::fputs(error, stderr);
    std::fwrite(y.data(), 1, y.size(), stdout);
    return error != nullptr;
}
"""


@pytest.fixture(params=["cpu"] + ["gpu"] * torch.cuda.is_available())
def run(request):
    """layer, x, path -> y, on this CPU or on a GPU."""
    if request.param == "cpu":
        return multiply_by_emulated_cuda
    return lambda layer, x, path: product(layer.cuda(), x.cuda(), path).cpu()


@pytest.mark.parametrize(
    "n_bits, group_size, dtype, path",
    [
        (3, 128, torch.float16, "fast"),
        (3, 128, torch.float32, "readable"),
        (5, 128, torch.float16, "readable"),
        (3, 64, torch.float16, "readable"),
    ],
)
def test_the_fast_kernel_runs_where_it_can_and_the_readable_one_elsewhere(n_bits, group_size, dtype, path, run):
    layer, x = random_layer(32, 384, n_bits, group_size), torch.randn(2, 384).to(dtype)
    assert torch.equal(run(layer, x, "cuda"), run(layer, x, path))
    if path == "readable":
        with pytest.raises(ValueError, match="fast kernel does not take"):
            run(layer, x, "fast")


@pytest.mark.parametrize("n_tokens", (9, 24, 61))
@pytest.mark.parametrize("group_size, dtype", [(128, torch.bfloat16), (64, torch.float32)])
def test_a_token_has_the_same_bits_in_any_prompt(group_size, dtype, n_tokens, run):
    layer, x = random_layer(33, 256, 3, group_size), torch.randn(n_tokens, 256).to(dtype)
    y = run(layer, x, "cuda")
    assert_right(y, layer, x)
    for i in (0, 8, n_tokens - 1):
        assert torch.equal(y[i], run(layer, x[i : i + 1], "cuda")[0])


@pytest.mark.parametrize("n_bits", (1, 2, 3, 4))
def test_blocks_that_share_a_tile_add_up_in_one_order(n_bits, run):
    """Eight of them, which end in any order (on the CPU a new one every time). What the second four find is what the
    first four found, with the other sign: so y is nothing but rounding, and another order gives another y."""
    layer, x = random_layer(40, 4096, n_bits, 512), torch.randn(2, 2048, dtype=torch.bfloat16)
    for part, dim in (layer.bit_planes, 2), (layer.alpha, 2), (layer.shift, 1):
        first, second = part.chunk(2, dim)
        second.copy_(first)
    x = torch.cat((x, -x), 1)
    y = run(layer, x, "fast")
    assert_right(y, layer, x)
    assert y.any()
    for _ in range(3):
        assert torch.equal(run(layer, x, "fast"), y)


@pytest.mark.parametrize("shape", [(33, 576, 3, 64), (1, 256, 4, 256), (64, 192, 8, 32), (40, 1536, 1, 1536)])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_dequantized_weight_is_that_of_pytorch(shape, dtype):
    layer = random_layer(*shape)
    assert torch.equal(dequantize_by_emulated_cuda(layer, dtype), layer.dequantize(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", TYPES)
def test_a_long_prompt_on_a_gpu_is_right(dtype):
    layer, x = random_layer(96, 256, 3, 128, "cuda"), torch.randn(2, 200, 256, device="cuda").to(dtype)
    w = layer.dequantize(dtype)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, w))


def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path):
    (tmp_path / "main.cpp").write_text(MAIN)
    program, options = tmp_path / "main", ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    compile_for_cpu(program, *options, str(tmp_path / "main.cpp"))
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    for path, *shape in [
        ("readable", 33, 96, 3, 32),
        ("readable", 31, 192, 8, 192),
        ("fast", 33, 384, 3, 128),
        ("fast", 1, 256, 4, 256),
        ("fast", 40, 1664, 2, 128),
    ]:
        layer, x = random_layer(*shape), torch.randn(3, shape[1]).half()
        tensors = [t.contiguous().view(-1).view(torch.uint8) for t in (*layer.buffers(), x)]
        sizes = [len(t) for t in tensors] + [x.element_size() * len(x) * layer.out_features]
        command = [program, *map(str, sizes + numbers(layer, x, path))]
        data = b"".join(t.numpy().tobytes() for t in tensors)
        run = subprocess.run(command, input=data, capture_output=True, env=environment)
        assert run.returncode == 0, run.stderr.decode()
        assert_right(torch.frombuffer(bytearray(run.stdout), dtype=x.dtype).view(len(x), -1), layer, x)


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100"))
def test_nvcc_keeps_everything_in_registers(arch, tmp_path):
    """80 registers for the 24 warps an SM should hold, 128 for the 16 at 4 bits; and nothing spilled."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc to compile kernel.cu with")
    command = ["nvcc", "-c", f"-arch={arch}", "-Xptxas", "-v", ROOT / "kernel.cu", "-o", tmp_path / "kernel.o"]
    report = subprocess.run(command, capture_output=True, text=True).stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill.*?Used (\d+) registers", report, re.S)
    assert len(kernels) == 22, report
    for name, spilled, registers in kernels:
        fast = re.match(r"_Z11fast_kernelILi(\d)", name)
        assert spilled == "0" and int(registers) <= (80 if fast and fast[1] < "4" else 128), (name, spilled, registers)
