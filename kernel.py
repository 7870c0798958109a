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
`python kernel.py` measures them on this machine.
"""

import argparse
import fcntl
import functools
import itertools
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from command import check_device, default_device, guarded

TILE = 32  # rows side by side, and columns in a word
MAX_BATCH = 8  # tokens that the kernels take at once
BUILD = (
    Path(__file__).with_name("build") / f"python{sys.version_info[0]}.{sys.version_info[1]}-torch{torch.__version__}"
)


def columns_per_group(in_features: int, group_size: int) -> int:
    """`group_size` with -1 (the whole row) resolved. Raises ValueError listing the sizes that do divide."""
    size = in_features if group_size == -1 else group_size
    if size < TILE or size % TILE or in_features % size:
        fitting = [s for s in range(TILE, in_features + 1, TILE) if in_features % s == 0]
        hint = f"try {', '.join(map(str, fitting))}, or -1 for the row" if fitting else f"it is no multiple of {TILE}"
        raise ValueError(f"in_features {in_features} cannot be cut into groups of {group_size} ({hint})")
    return size


def bits_per_weight(n_bits: int, group_size: int) -> float:
    """Stored bits per weight with the fp16 alphas and shift of each group counted."""
    return n_bits + 16 * (n_bits + 1) / group_size


def to_tiles(x: Tensor) -> Tensor:
    """(out, ...) -> (out/32, ..., 32): pad the rows with zeros, then move the 32 rows of a tile last."""
    padding = x.new_zeros(-x.shape[0] % TILE, *x.shape[1:])
    return torch.cat((x, padding)).unflatten(0, (-1, TILE)).movedim(1, -1).contiguous()


def from_tiles(x: Tensor, out_features: int) -> Tensor:
    """(out/32, ..., 32) -> (out, ...): the inverse of `to_tiles`."""
    return x.movedim(-1, 1).flatten(0, 1)[:out_features]


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """codes: (out, in) uint8, below 2^n_bits -> bit_planes, int32 as above. Raises ValueError on what does not fit."""
    if codes.shape[1] % TILE:
        raise ValueError(f"in_features {codes.shape[1]} is not a multiple of {TILE}")
    if codes.numel() and int(codes.max()) >= 2**n_bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {n_bits} bits")
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)  # of the bits within a byte
    planes = []
    for i in range(n_bits):
        bits = (codes >> (n_bits - 1 - i)) & 1  # (out, in)
        octets = (bits.unflatten(1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)  # (out, in/8)
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


@functools.cache
def library() -> ModuleType | None:
    """kernel.cpp, and kernel.cu where there is a GPU, compiled at the first call; None where that is not possible."""
    from torch.utils import cpp_extension  # takes a second

    here, with_cuda = Path(__file__).parent, torch.cuda.is_available() and cpp_extension.CUDA_HOME is not None
    sources = [here / "kernel.cpp"] + ([here / "kernel.cu"] if with_cuda else [])
    # -fopenmp only when compiling: when linking, it would bring a second thread pool beside PyTorch's; without
    # -fno-tree-ter GCC undoes the order of the innermost loop, and every addition waits for the one before
    flags = ["-O3", "-fopenmp", "-fno-tree-ter", "-Wno-psabi"] + ["-DWITH_CUDA"] * with_cuda
    try:
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            raise OSError("no C++ compiler is installed")
        import ninja

        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR  # not on it in a virtual environment that is not activated
        BUILD.mkdir(parents=True, exist_ok=True)
        with open(BUILD / "in_use", "w") as in_use:
            fcntl.flock(in_use, fcntl.LOCK_EX)  # one process at a time; ends with it, however that ends
            # PyTorch has a lock of its own: a process that is killed leaves it, and the next would wait for ever
            (BUILD / "lock").unlink(missing_ok=True)
            built = sorted(BUILD.glob("*.so"))
            if not built or built[0].stat().st_mtime < max(file.stat().st_mtime for file in sources):
                print(f"compiling {', '.join(f.name for f in sources)}, once, about a minute ...", file=sys.stderr)
            return cpp_extension.load(
                "flexbcq_kernel", list(map(str, sources)), build_directory=str(BUILD), with_cuda=with_cuda,
                extra_cflags=flags, extra_cuda_cflags=["-O3"],
            )  # fmt: skip
    except Exception as error:  # whatever it is, plain PyTorch does the same, slower
        said = str(error).splitlines()
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


class BCQLinear(nn.Module):
    """y = x @ W.T with W held as bit-planes. Built empty; filled by `from_codes` or `load_state_dict`.

    Raises ValueError if n_bits is not 1..8 or the group size does not divide in_features."""

    def __init__(self, in_features: int, out_features: int, n_bits: int, group_size: int = -1):
        super().__init__()
        if n_bits not in range(1, 9):
            raise ValueError(f"{n_bits} bits: choose 1 to 8")
        self.in_features, self.out_features, self.n_bits = in_features, out_features, n_bits
        self.group_size = columns_per_group(in_features, group_size)
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
        """x: (..., in_features) -> (..., out_features) in the dtype of x. Raises ValueError on another width.

        A few tokens are multiplied from the bit-planes; many, or those that need gradients, by the dequantized weight.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} columns, the weight has in_features {self.in_features}")
        weight = self._buffers.values()  # bit_planes, alpha, shift; by name each would cost as much as a small product
        few = 1 <= x.numel() // self.in_features <= MAX_BATCH
        path = paths(x.device.type)[0] if few and not x.requires_grad else "torch"
        if path == "torch":
            return F.linear(x, self.dequantize(x.dtype))
        return library().multiply(x, *weight, self.out_features, path)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, n_bits={self.n_bits}, group_size={self.group_size}"


# -------------------------------------------------------------------------------------------------- measure it


def random_layer(out_features: int, in_features: int, n_bits: int, group_size: int, device="cpu") -> BCQLinear:
    """A layer of random bits, for measuring and testing."""
    layer = BCQLinear(in_features, out_features, n_bits, group_size)
    layer.bit_planes.random_(-(2**31), 2**31)
    layer.alpha.uniform_(0.1, 1)
    layer.shift.normal_()
    return layer.to(device)


def medians(contestants: dict[str, list[Callable]], device: torch.device, n_rounds: int) -> dict[str, float]:
    """Median seconds of one call. Each contestant is a list of calls that do the same with copies of their data, more
    than a cache holds; they take turns, so that what slows the machine down hits them alike."""
    seconds = {name: [] for name in contestants}
    timer = _seconds_cuda if device.type == "cuda" else _seconds_cpu
    for calls in contestants.values():
        timer(calls)  # warm up
    for _ in range(n_rounds):
        for name, calls in contestants.items():
            seconds[name] += timer(calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds_cpu(calls: list[Callable]) -> list[float]:
    seconds = []
    for call in calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _seconds_cuda(calls: list[Callable]) -> list[float]:
    """All calls in one CUDA graph, so that launching them from Python is not what is measured."""
    graph, start, stop = torch.cuda.CUDAGraph(), torch.cuda.Event(True), torch.cuda.Event(True)
    for call in calls:
        call()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []
    for _ in range(5):
        graph.replay()  # not timed: the card is still busy with it when the next one arrives
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1000 / len(calls))
    return seconds[1:]


def measure(shape: tuple[int, int], n_bits: int, args: argparse.Namespace) -> list[dict]:
    """One row of the table per batch size: ours and F.linear, in turns."""
    device, (out_features, in_features) = torch.device(args.device), shape
    layers = [random_layer(*shape, n_bits, args.group_size, device)]
    size = sum(t.nbytes for t in layers[0].buffers())
    layers += [random_layer(*shape, n_bits, args.group_size, device) for _ in range(min(99, int(2.4e8 // size)))]
    dense = [torch.float16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    n_copies = 1 + int(2.4e8 // (out_features * in_features * 2))
    weights = {t: [torch.randn(shape, device=device).to(t) for _ in range(n_copies)] for t in dense}
    stream, rows = torch.randn(2**26, device=device), []
    for batch in args.batch:
        x = {dtype: torch.randn(batch, in_features, device=device, dtype=dtype) for dtype in dense}
        ours = [functools.partial(layer, x[dense[0]]) for layer in layers]
        contestants = {"bcq": ours, "read": [stream.sum]}
        contestants |= {str(t): [functools.partial(F.linear, x[t], w) for w in weights[t]] for t in dense}
        seconds = medians(contestants, device, args.rounds)
        us, speed, read = seconds["bcq"] * 1e6, size / seconds["bcq"] / 1e9, stream.nbytes / seconds["read"] / 1e9
        row = {"out x in": f"{out_features} x {in_features}", "bits": n_bits, "batch": batch}
        row |= {"us": f"{us:.{int(us < 100)}f}", "GB/s": f"{speed:.1f}", "% of read": f"{100 * speed / read:.0f}"}
        for dtype in dense:
            row[f"x F.linear {str(dtype)[6:]}"] = f"{seconds[str(dtype)] / seconds['bcq']:.1f}"
        rows.append(row | {"read GB/s": f"{read:.1f}"})
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """GB/s of weights against bits, a line per shape at the first batch size, and the read bandwidth as the roof."""
    from matplotlib.figure import Figure  # only here: everything imports this module

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    first = [row for row in rows if row["batch"] == rows[0]["batch"]]
    looks = itertools.cycle(zip("osD^", ("#0072B2", "#D55E00", "#009E73", "#CC79A7")))
    for shape, (marker, color) in zip(dict.fromkeys(row["out x in"] for row in first), looks):
        points = [(r["bits"], float(r["GB/s"])) for r in first if r["out x in"] == shape]
        axes.plot(*zip(*points), marker=marker, color=color, label=shape)
    roof = statistics.median(float(row["read GB/s"]) for row in rows)
    axes.axhline(roof, color="black", linestyle="--", label="read bandwidth")
    axes.set(xlabel="bits per weight (planes)", ylabel="weights read, GB/s", ylim=(0, None))
    axes.set(title=f"y = x W^T from bit-planes, batch {rows[0]['batch']}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def positive(text: str) -> int:
    """For argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def shape(text: str) -> tuple[int, int]:
    """ "8192x28672" -> (8192, 28672)."""
    out_features, in_features = map(positive, text.split("x"))
    return out_features, in_features


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the kernels of this machine against F.linear.")
    add = parser.add_argument
    add("--shapes", nargs="+", type=shape, default=[(8192, 28672), (14336, 4096)], help="rows x columns of the weight "
        "(default: 8192x28672 14336x4096)")  # fmt: skip
    add("--bits", nargs="+", type=int, default=[2, 3, 4], help="(default: 2 3 4)")
    add("--batch", nargs="+", type=positive, default=[1, 4, 8], help="tokens at once (default: 1 4 8)")
    add("--group-size", type=int, default=128, help="-1: a row (default: %(default)s)")
    add("--device", default=default_device(), help="(default: %(default)s)")
    add("--rounds", type=positive, default=15, help="measurements each, the median counts (default: %(default)s)")
    add("--out", default="benchmark", help="writes OUT.md and OUT.png (default: %(default)s)")
    guarded(run, parser)


def run(args: argparse.Namespace) -> None:
    cuda = check_device(args.device).type == "cuda"
    name = torch.cuda.get_device_name(args.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    title = f"{name}, groups of {args.group_size}, path {paths('cuda' if cuda else 'cpu')[0]}"
    rows, jobs = [], [(shape, n_bits) for shape in args.shapes for n_bits in args.bits]
    with torch.inference_mode():
        for job in tqdm(jobs, unit="weight", leave=False):
            rows += measure(*job, args)
    lines = [list(rows[0]), ["---:"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    table = f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    print(table)
    Path(args.out + ".md").write_text(table, "utf-8")
    plot(rows, Path(args.out + ".png"))


if __name__ == "__main__":
    main()
