"""A product by any path, and whether it is right. kernel.cu runs on this CPU too: by g++, with cuda_on_cpu.h."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from kernel import BCQLinear, from_tiles, library, unpack

ROOT = Path(__file__).parent.parent.parent
PATHS = ("cuda", "readable", "fast")  # in the order of kernel.cu, as are the types
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def compile_for_cpu(output: Path, *arguments: str) -> None:
    """g++ with kernel.cu and the header that stands in for CUDA. Skips the test where there is no g++."""
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile kernel.cu with")
    command = ["g++", "-std=c++17", "-O1", "-g", "-fno-strict-aliasing", *arguments]
    command += ["-x", "c++", "-include", ROOT / "tests/robustness/cuda_on_cpu.h", ROOT / "kernel.cu", "-o", output]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@functools.cache
def compiled() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:  # what is loaded stays when its file goes
        compile_for_cpu(Path(folder) / "kernel.so", "-shared", "-fPIC")
        library = ctypes.CDLL(f"{folder}/kernel.so")
    library.bcq_matmul_cuda.restype = library.bcq_dequantize_cuda.restype = ctypes.c_char_p
    library.bcq_matmul_workspace_bytes.restype = ctypes.c_size_t
    return library


def numbers(layer: BCQLinear, x: torch.Tensor, path: str) -> list[int]:
    """The integers that bcq_matmul_cuda takes after the workspace, in its order."""
    sizes = len(x), layer.in_features, layer.out_features, layer.n_bits, layer.group_size
    return [TYPES.index(x.dtype), *sizes, PATHS.index(path)]


def multiply_by_emulated_cuda(layer: BCQLinear, x: torch.Tensor, path: str) -> torch.Tensor:
    """x: (batch, in_features), contiguous -> (batch, out_features). Raises ValueError as the kernel says."""
    size = len(x) * layer.out_features
    y = torch.full((size + 64,), torch.nan, dtype=x.dtype)
    workspace = torch.full((compiled().bcq_matmul_workspace_bytes(layer.in_features),), 255, dtype=torch.uint8)
    tensors = layer.bit_planes, layer.alpha, layer.shift, x, y, workspace
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
    error = compiled().bcq_matmul_cuda(*pointers, *numbers(layer, x, path), None)
    if error:
        raise ValueError(error.decode())
    assert y[size:].isnan().all(), "written past the end of y"
    return y[:size].view(len(x), -1)


def dequantize_by_emulated_cuda(layer: BCQLinear, dtype: torch.dtype) -> torch.Tensor:
    """(out_features, in_features), by the kernel."""
    weight = torch.full((layer.in_features * layer.out_features + 64,), torch.nan, dtype=dtype)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (layer.bit_planes, layer.alpha, layer.shift, weight))
    sizes = layer.in_features, layer.out_features, layer.n_bits, layer.group_size
    assert compiled().bcq_dequantize_cuda(*pointers, TYPES.index(dtype), *sizes, None) is None
    assert weight[-64:].isnan().all(), "written past the end"
    return weight[:-64].view(layer.out_features, layer.in_features)


def product(layer: BCQLinear, x: torch.Tensor, path: str) -> torch.Tensor:
    """By one path, past `BCQLinear.forward`; "fast on cpu" and the like are kernel.cu compiled by g++."""
    if path.endswith(" on cpu"):
        return multiply_by_emulated_cuda(layer, x, path.removesuffix(" on cpu"))
    library()  # loads the operator
    return torch.ops.flexbcq.multiply(x, layer.bit_planes, layer.alpha, layer.shift, layer.out_features, path)


def exact_weight(layer: BCQLinear) -> torch.Tensor:
    """(out, in) float64, from the bits."""

    def per_weight(x: torch.Tensor) -> torch.Tensor:
        return from_tiles(x, layer.out_features).double().repeat_interleave(layer.group_size, dim=1)

    codes, weight = unpack(layer.bit_planes, layer.out_features), per_weight(layer.shift)
    for i, alpha in enumerate(layer.alpha):
        weight += (2.0 * (codes >> (layer.n_bits - 1 - i) & 1) - 1) * per_weight(alpha)
    return weight


def assert_right(y: torch.Tensor, layer: BCQLinear, x: torch.Tensor) -> None:
    """Up to the rounding of y, and 1e-6 of the largest |x| times every |w|."""
    w, x = exact_weight(layer), x.double()
    exact = x @ w.T
    allowed = torch.finfo(y.dtype).eps * exact.abs() + 1e-6 * x.abs().amax(1, keepdim=True) * w.abs().sum(1)
    excess = (y.double() - exact).abs() / allowed
    assert not y.isnan().any() and excess.max() <= 1, f"{excess.max():.1f} times the allowed error"
