"""Bit-planes: the form in which quantized weights are stored and multiplied.

A weight is w = sum_i alpha_i * b_i + shift with b_i in {-1, +1}. All b_i of one layer form bit-plane i (1 means +1);
alpha and shift are shared by `group_size` neighbouring columns of a row. One layout serves every device:

    bit_planes  int32  (n_bits, out/32, in/32, 32)      word [i, t, c, r]: plane i, row 32t + r, columns 32c .. 32c+31;
                                                        bit j of the word (1 << j) is column 32c + j
    alpha       fp16   (n_bits, out/32, in/group_size, 32)
    shift       fp16   (out/32, in/group_size, 32)

32 rows lie side by side, so one word of each is a 128-byte line: a coalesced load for a warp, whole vectors for a
CPU. Rows are padded with zeros to a multiple of 32. Storage is n_bits + 16 (n_bits + 1) / group_size bits per weight.

`codes` are the bits of one weight as an integer, plane 0 the most significant: for a uniform quantizer, where
alpha halves from plane to plane, they are the familiar 0 .. 2^n_bits - 1.

Up to 32 tokens on a CPU (scalar: 8), 64 on a GPU, are multiplied straight from the bit-planes; for more the weight is
dequantized, on a CPU a few tiles at a time. The first of these paths that a machine offers does it:

    on a GPU    cuda                        kernel.cu: its fast kernel where the shape allows it, else the readable one
    on a CPU    avx512, avx2, neon, scalar  support/cpu/cpu.h, which also tells what avx512_int8 and the like are
    anywhere    torch                       plain PyTorch: dequantize, then a matrix product

The environment variable FLEXBCQ_KERNEL=NAME forces one. The kernels are compiled when first needed, into build/
or, if that cannot be written to, into ~/.cache/flexbcq. `python -m experiments.kernels` measures them on this machine.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 32  # rows side by side, and columns in a word


def columns_per_group(in_features: int, group_size: int) -> int:
    """`group_size` with -1 (the whole row) resolved. Raises ValueError listing the sizes that do divide.

    >>> columns_per_group(256, 64), columns_per_group(256, -1)
    (64, 256)"""
    size = in_features if group_size == -1 else group_size
    if size < TILE or size % TILE or in_features % size:
        fitting = [s for s in range(TILE, in_features + 1, TILE) if in_features % s == 0]
        hint = f"try {', '.join(map(str, fitting))}, or -1 for the row" if fitting else f"it is no multiple of {TILE}"
        raise ValueError(f"in_features {in_features} cannot be cut into groups of {group_size} ({hint})")
    return size


def bits_per_weight(n_bits: int, group_size: int) -> float:
    """Stored bits per weight with the fp16 alphas and shift of each group counted.

    >>> bits_per_weight(3, 128)
    3.5"""
    return n_bits + 16 * (n_bits + 1) / group_size


def to_tiles(x: Tensor) -> Tensor:
    """(out, ...) -> (out/32, ..., 32): pad the rows with zeros, then move the 32 rows of a tile last."""
    padding = x.new_zeros(-x.shape[0] % TILE, *x.shape[1:])
    return torch.cat((x, padding)).unflatten(0, (-1, TILE)).movedim(1, -1).contiguous()


def from_tiles(x: Tensor, out_features: int) -> Tensor:
    """(out/32, ..., 32) -> (out, ...): the inverse of `to_tiles`."""
    return x.movedim(-1, 1).flatten(0, 1)[:out_features]


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """codes: (out, in) uint8, below 2^n_bits -> bit_planes, int32 as above. Raises ValueError on what does not fit.

    >>> codes = torch.zeros(1, 32, dtype=torch.uint8)
    >>> codes[0, :4] = torch.tensor([0, 1, 2, 3])
    >>> pack(codes, 2)[:, 0, 0, 0]  # plane 0: bits 2 and 3 are set, plane 1: bits 1 and 3
    tensor([12, 10], dtype=torch.int32)"""
    if codes.shape[1] % TILE:
        raise ValueError(f"in_features {codes.shape[1]} is not a multiple of {TILE}")
    if codes.numel() and int(codes.max()) >= 2**n_bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {n_bits} bits")

    place_value = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)  # of the bits within a byte
    planes = []
    for i in range(n_bits):
        bits = (codes >> (n_bits - 1 - i)) & 1  # (out, in)
        octets = (bits.unflatten(1, (-1, 8)) * place_value).sum(-1, dtype=torch.uint8)  # (out, in/8)
        planes.append(to_tiles(octets.view(torch.int32)))  # four bytes a word, the first one lowest (little-endian)
    return torch.stack(planes)


def unpack_plane(plane: Tensor, out_features: int) -> Tensor:
    """plane: (out/32, in/32, 32) int32 -> its bits, (out, in) uint8."""
    octets = plane.view(torch.uint8).unflatten(-1, (TILE, 4))  # (out/32, in/32, 32, 4)
    octets = octets.movedim(2, 1).flatten(2).flatten(0, 1)[:out_features]  # (out, in/8)
    places = torch.arange(8, dtype=torch.uint8, device=plane.device)
    return ((octets.unsqueeze(-1) >> places) & 1).flatten(1)


def unpack(bit_planes: Tensor, out_features: int) -> Tensor:
    """bit_planes: int32 as above -> codes, (out_features, in) uint8. The inverse of `pack`."""
    codes = 0
    for plane in bit_planes:
        codes = (codes << 1) | unpack_plane(plane, out_features)
    return codes


def dequantize(bit_planes: Tensor, alpha: Tensor, shift: Tensor, out_features: int) -> Tensor:
    """The weight, (out_features, in_features) float32, from its parts as they are stored."""
    in_features = bit_planes.shape[2] * TILE
    group_size = in_features // alpha.shape[2]

    def per_weight(x: Tensor) -> Tensor:  # (out/32, in/group_size, 32) fp16 -> (out, in) float32
        return from_tiles(x, out_features).float().repeat_interleave(group_size, dim=1)

    weight = per_weight(shift)
    for plane, alpha_of_plane in zip(bit_planes, alpha):
        sign = unpack_plane(plane, out_features).float() * 2 - 1
        weight.addcmul_(sign, per_weight(alpha_of_plane))
    return weight


# -------------------------------------------------------------------------------------------- the compiled kernels


HERE = Path(__file__).parent
FOLDERS = [HERE / "build", Path.home() / ".cache" / "flexbcq"]  # where compiled kernels are looked for and kept


def compiled_name(with_cuda: bool) -> str:
    """A file name that changes with the sources, the system, PyTorch and the GPU. Not with the compiler: after
    changing it, delete build/."""
    sources = [HERE / "kernel.cpp", *sorted((HERE / "support" / "cpu").glob("*.h"))]
    if with_cuda:
        sources.append(HERE / "kernel.cu")
    card = f"{torch.version.cuda} {torch.cuda.get_device_capability()}" if with_cuda else ""
    digest = hashlib.sha256(f"{platform.platform()} {torch.__version__} {card}".encode())
    for path in sources:
        digest.update(path.read_bytes())
    return f"flexbcq_kernel-{digest.hexdigest()[:16]}.so"


class Library(NamedTuple):
    """What the compiled kernels offer; the product itself is torch.ops.flexbcq.multiply."""

    cpu_paths: list[str]
    has_cuda: bool


def compile_kernels(target: Path, with_cuda: bool) -> ctypes.CDLL:
    """Compile kernel.cpp, and kernel.cu for a GPU, to `target`, and load them. Raises whatever goes wrong."""
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise OSError(f"no C++ compiler {compiler} is installed")

    import ninja
    from torch.utils import cpp_extension  # takes a second

    sources = ["kernel.cpp", "kernel.cu"] if with_cuda else ["kernel.cpp"]
    print(f"compiling {' and '.join(sources)}, once, about a minute ...", file=sys.stderr)

    # ninja's program is not on the PATH in a virtual environment that is not activated
    os.environ["PATH"] = os.environ.get("PATH", "") + os.pathsep + ninja.BIN_DIR
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as work:
        cpp_extension.load(
            "flexbcq_kernel",
            [str(HERE / source) for source in sources],
            build_directory=work,
            with_cuda=with_cuda,
            is_python_module=False,
            extra_cflags=["-O3", "-Wall"] + ["-DWITH_CUDA"] * with_cuda,
            extra_cuda_cflags=["-O3"],
            extra_include_paths=[str(HERE)],
        )
        (built,) = [path for path in Path(work).iterdir() if path.suffix in (".so", ".pyd")]
        shutil.copyfile(built, target.with_suffix(".tmp"))
        target.with_suffix(".tmp").replace(target)  # whole or not at all
        return ctypes.CDLL(str(built))


def load_kernels(with_cuda: bool) -> Library:
    """Load the compiled kernels, which are made if they are in none of the `FOLDERS` (the first may be read-only)."""
    name, loaded = compiled_name(with_cuda), None
    file = next((folder / name for folder in FOLDERS if (folder / name).exists()), None)
    if file is None:
        from filelock import FileLock

        file = (FOLDERS[0] if os.access(FOLDERS[0].parent, os.W_OK) else FOLDERS[1]) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.parent / "lock"):  # one process compiles; the lock ends with it, however that ends
            if not file.exists():
                loaded = compile_kernels(file, with_cuda)
    if loaded is None:
        torch.ops.load_library(file)
        loaded = ctypes.CDLL(str(file))

    torch.library.register_fake("flexbcq::multiply", multiply_fake)
    torch.library.register_autograd("flexbcq::multiply", multiply_backward, setup_context=keep_weight)
    loaded.flexbcq_cpu_paths.restype = ctypes.c_char_p
    return Library(loaded.flexbcq_cpu_paths().decode().split(), with_cuda)


@functools.cache
def library() -> Library | None:
    """The compiled kernels, or None where they are not available, after printing why.

    Where those for the GPU are not available, those for the CPU may still be."""
    kinds = [False]
    if torch.cuda.is_available():
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None:
            print("no nvcc: plain PyTorch on the GPU; install the CUDA toolkit or set CUDA_HOME", file=sys.stderr)
        else:
            kinds = [True, False]

    for with_cuda in kinds:
        try:
            return load_kernels(with_cuda)
        except Exception as error:  # whatever it is, plain PyTorch does the same, slower
            said = str(error).splitlines() or [repr(error)]
            reason = next((line for line in said if "error: " in line), said[0])  # a compiler's is not the first line
            kernels = "kernels for the GPU" if with_cuda else "kernels"
            print(f"no compiled {kernels} ({reason[:150]}): on with plain PyTorch", file=sys.stderr)
    return None


def has_tangent(x: Tensor) -> bool:
    """Whether x takes part in forward-mode differentiation, which the operator does not support."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def multiply_fake(x: Tensor, planes: Tensor, alpha: Tensor, shift: Tensor, out_features: int, path: str) -> Tensor:
    """The shape of a product, for torch.compile and torch.export."""
    return x.new_empty((*x.shape[:-1], out_features))


def keep_weight(ctx, inputs: tuple, output: Tensor) -> None:
    """Save what `multiply_backward` needs: bit_planes, alpha, shift and out_features."""
    _, *weight, ctx.out_features, _ = inputs
    ctx.save_for_backward(*weight)


def multiply_backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
    """dL/dx = g W; the weight is a constant. Used when the operator is called directly."""
    return g @ dequantize(*ctx.saved_tensors, ctx.out_features).to(g.dtype), None, None, None, None, None


NAMES = ("cuda", "fast", "readable", "avx512", "avx2", "neon", "scalar", "emulated", "torch")
NAMES += ("avx512_int8", "avx2_int8", "neon_int8", "emulated_int8")


def forced_path() -> str | None:
    """What FLEXBCQ_KERNEL asks for. Raises ValueError if no path has this name."""
    name = os.environ.get("FLEXBCQ_KERNEL")
    if name and name not in NAMES:
        raise ValueError(f"FLEXBCQ_KERNEL={name}: no such kernel; there are {', '.join(NAMES)}")
    return name


@functools.cache
def paths(device_type: str) -> list[str]:
    """The paths available on "cpu" or "cuda", best first; the last one is always "torch".

    With FLEXBCQ_KERNEL set, only that one. Raises ValueError if this machine does not have it."""
    forced = forced_path()
    if forced == "torch" or device_type not in ("cpu", "cuda") or library() is None:
        found = []
    elif device_type == "cpu":
        found = list(library().cpu_paths)
    else:
        found = ["cuda", "fast", "readable"] if library().has_cuda else []
    found.append("torch")

    if forced and forced not in found:
        raise ValueError(f"FLEXBCQ_KERNEL={forced}: this machine offers {', '.join(found)}")
    return [forced] if forced else found


@torch.compiler.assume_constant_result  # torch.compile does not look into it
def best_path(device_type: str) -> str:
    """The first of `paths`."""
    return paths(device_type)[0]


# ---------------------------------------------------------------------------------------------------- the layer


class BCQLinear(nn.Module):
    """y = x @ W.T + bias with W held as bit-planes. Built empty; filled by `from_codes` or `load_state_dict`.

    Raises ValueError if n_bits is not 1..8 or the group size does not divide in_features."""

    def __init__(self, in_features: int, out_features: int, n_bits: int, group_size: int = -1, bias: bool = False):
        super().__init__()
        if n_bits not in range(1, 9):
            raise ValueError(f"{n_bits} bits: choose 1 to 8")
        self.in_features = in_features
        self.out_features = out_features
        self.n_bits = n_bits
        self.group_size = columns_per_group(in_features, group_size)

        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None  # the one thing that is not quantized

        # `forward` hands the buffers to the kernel in the order in which they are registered here
        tiles, groups = -(-out_features // TILE), in_features // self.group_size
        self.register_buffer("bit_planes", torch.zeros(n_bits, tiles, in_features // TILE, TILE, dtype=torch.int32))
        self.register_buffer("alpha", torch.zeros(n_bits, tiles, groups, TILE, dtype=torch.float16))
        self.register_buffer("shift", torch.zeros(tiles, groups, TILE, dtype=torch.float16))

    @classmethod
    def from_codes(cls, codes: Tensor, alpha: Tensor, shift: Tensor) -> "BCQLinear":
        """Pack one layer.

        codes: (out, in) uint8
        alpha: (out, in/group_size, n_bits) float, rounded to fp16 here
        shift: (out, in/group_size) float, rounded to fp16 here
        Raises ValueError if alpha or shift does not fit into fp16."""
        out_features, groups, n_bits = alpha.shape
        layer = cls(codes.shape[1], out_features, n_bits, codes.shape[1] // groups)
        layer.bit_planes = pack(codes, n_bits)
        layer.alpha = to_tiles(alpha.half()).movedim(2, 0).contiguous()  # (out/32, groups, n_bits, 32) -> n_bits first
        layer.shift = to_tiles(shift.half())
        if not (layer.alpha.isfinite().all() and layer.shift.isfinite().all()):
            raise ValueError("alpha or shift is NaN or beyond the range of fp16")
        return layer

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out_features, in_features): the sum over planes, added up in float32 one plane at a time."""
        return dequantize(self.bit_planes, self.alpha, self.shift, self.out_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features) in the dtype of x, or that of autocast where it is on.

        The kernels multiply; without them, or if x needs a gradient, PyTorch dequantizes the weight. Raises ValueError
        if x has another width, is not floating-point, or is float64 where a GPU's kernels would multiply."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} columns, the weight has in_features {self.in_features}")
        if not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}: a product with the weight needs floating-point numbers")
        device_type = "cpu" if x.is_cpu else x.device.type  # asking a device for its type is slow
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))

        taken = x.numel() and not (x.requires_grad or has_tangent(x))
        path = best_path(device_type) if taken else "torch"
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if path == "torch":
            return F.linear(x, self.dequantize(x.dtype), bias)

        # attribute access on a Module is slow: three lookups by name cost as much as a small product
        planes_alpha_shift = self._buffers.values()
        y = torch.ops.flexbcq.multiply.default(x, *planes_alpha_shift, self.out_features, path)
        return y if bias is None else y + bias

    def _apply(self, fn, recurse=True):
        """Moved with its model to another device, not to another dtype: planes, alpha and shift stay as stored."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in stored.items():
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, n_bits={self.n_bits}, group_size={self.group_size}"


class BCQEmbedding(BCQLinear):
    """An embedding whose table is held as bit-planes."""

    dtype = torch.float32  # of the rows that are looked up

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...) int64 -> their rows, (..., in_features); no other row is dequantized."""
        tile, row = ids.flatten() // TILE, ids.flatten() % TILE
        planes, alpha = (to_tiles(x[:, tile, :, row]).movedim(1, 0) for x in (self.bit_planes, self.alpha))
        rows = dequantize(planes, alpha, to_tiles(self.shift[tile, :, row]), len(tile))
        return rows.to(self.dtype).view(*ids.shape, self.in_features)
