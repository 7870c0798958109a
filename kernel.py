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

Up to 8 tokens at a time are multiplied straight from the bit-planes, by the first of these paths that a machine offers:

    on a GPU    cuda                   kernel.cu: its fast kernel where the shape allows it, else the readable one
    on a CPU    avx512, avx2, scalar   kernel.cpp
    anywhere    torch                  plain PyTorch: dequantize, then a matrix product

The environment variable FLEXBCQ_KERNEL=NAME forces one. The kernels are compiled when first needed, into build/.
`python -m experiments.kernels` measures them on this machine.
"""

import functools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 32  # rows side by side, and columns in a word
MAX_BATCH = 8  # tokens that the kernels take at once
BUILD = (
    Path(__file__).with_name("build") / f"python{sys.version_info[0]}.{sys.version_info[1]}-torch{torch.__version__}"
)


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


# -------------------------------------------------------------------------------------------- the compiled kernels


def compiler_flags(compiler: str) -> list[str]:
    """Those of our flags that a compiler takes without a warning: Apple's clang has no OpenMP, MSVC knows none of them.

    -fopenmp: for compiling only; when linking, it would bring a second thread pool beside PyTorch's
    -fno-tree-ter: without it GCC undoes the order of the innermost loop, and every addition waits for the one before"""
    taken = ["-O3"]
    for flag in ("-fopenmp", "-fno-tree-ter", "-Wno-psabi"):
        source = "#include <omp.h>\n" if flag == "-fopenmp" else ""
        command = [*shlex.split(compiler), flag, "-Werror", "-x", "c++", "-fsyntax-only", "-"]
        if subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0:
            taken.append(flag)
    return taken


def compile_library() -> ModuleType:
    """kernel.cpp, and kernel.cu where there is a GPU, compiled into `BUILD` if that is not done yet."""
    import ninja
    from filelock import FileLock
    from torch.utils import cpp_extension  # takes a second

    compiler = cpp_extension.get_cxx_compiler()  # CXX, c++, or cl on Windows
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise OSError("no C++ compiler is installed")
    os.environ["PATH"] += os.pathsep + ninja.BIN_DIR  # not on it in a virtual environment that is not activated

    here = Path(__file__).parent
    with_cuda = torch.cuda.is_available() and cpp_extension.CUDA_HOME is not None
    sources = [here / "kernel.cpp"] + ([here / "kernel.cu"] if with_cuda else [])

    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "in_use"):  # one process at a time; ends with it, however that ends
        # PyTorch has a lock of its own: a process that is killed leaves it, and the next would wait for ever
        (BUILD / "lock").unlink(missing_ok=True)

        built = [*BUILD.glob("flexbcq_kernel*.so"), *BUILD.glob("flexbcq_kernel*.pyd")]
        if not built or built[0].stat().st_mtime < max(file.stat().st_mtime for file in sources):
            print(f"compiling {', '.join(f.name for f in sources)}, once, about a minute ...", file=sys.stderr)
        return cpp_extension.load(
            "flexbcq_kernel",
            [str(source) for source in sources],
            build_directory=str(BUILD),
            with_cuda=with_cuda,
            extra_cflags=compiler_flags(compiler) + ["-DWITH_CUDA"] * with_cuda,
            extra_cuda_cflags=["-O3"],
        )


@functools.cache
def library() -> ModuleType | None:
    """The compiled kernels; None where they cannot be had, with one line that says why."""
    try:
        return compile_library()
    except Exception as error:  # whatever it is, plain PyTorch does the same, slower
        said = str(error).splitlines() or [repr(error)]
        reason = next((line for line in said if "error: " in line), said[0])  # a compiler's is not the first line
        print(f"no compiled kernels ({reason[:150]}): on with plain PyTorch", file=sys.stderr)
        return None


@functools.cache
def paths(device_type: str) -> list[str]:
    """The paths there are on "cpu" or "cuda", best first; the last one is always "torch".

    With FLEXBCQ_KERNEL set only that one. Raises ValueError if this machine does not have it."""
    forced = os.environ.get("FLEXBCQ_KERNEL")
    if forced == "torch" or device_type not in ("cpu", "cuda") or library() is None:
        found = []
    elif device_type == "cpu":
        found = library().cpu_paths()
    else:
        found = ["cuda", "fast", "readable"] if hasattr(library(), "cuda") else []
    found.append("torch")

    if forced and forced not in found:
        raise ValueError(f"FLEXBCQ_KERNEL={forced}: this machine offers {', '.join(found)}")
    return [forced] if forced else found


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

        def per_weight(x: Tensor) -> Tensor:  # (out/32, in/group_size, 32) fp16 -> (out, in) float32
            return from_tiles(x, self.out_features).float().repeat_interleave(self.group_size, dim=1)

        weight = per_weight(self.shift)
        for plane, alpha in zip(self.bit_planes, self.alpha):
            sign = unpack_plane(plane, self.out_features).float() * 2 - 1
            weight.addcmul_(sign, per_weight(alpha))
        return weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features) in the dtype of x, or that of autocast where it is on.

        A few tokens are multiplied from the bit-planes; many, or those that need gradients, by the dequantized weight.
        Raises ValueError on another width or on whole numbers."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} columns, the weight has in_features {self.in_features}")
        if not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}: a product with the weight needs floating-point numbers")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))

        few = 1 <= x.numel() // self.in_features <= MAX_BATCH
        path = paths(x.device.type)[0] if few and not x.requires_grad else "torch"
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if path == "torch":
            return F.linear(x, self.dequantize(x.dtype), bias)

        # attribute access on a Module is slow: three lookups by name cost as much as a small product
        planes_alpha_shift = self._buffers.values()
        y = library().multiply(x, *planes_alpha_shift, self.out_features, path)
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
