"""Measure all kernels of this machine against F.linear, at several widths and batch sizes.

    python -m experiments.kernels                          # two shapes of Llama-3 at 2, 3 and 4 bits
    python -m experiments.kernels --shapes 1024x1024 --batch 1 --paths avx2 scalar

Writes the table to OUT.md and a plot to OUT.png.
"""

import argparse
import functools
import itertools
import statistics
import time
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from kernel import NAMES, BCQLinear, paths
from support.command import check_device, default_device, guarded

CACHE = 2.4e8  # bytes: no cache of a CPU or GPU holds as much
PATIENCE = 60  # seconds for one batch size; slow contestants are measured less often, but at least 3 times
USEFUL = ("cuda", "avx512", "avx512_int8", "avx2", "avx2_int8", "neon", "neon_int8")  # the others are there for tests


def random_layer(out_features: int, in_features: int, n_bits: int, group_size: int, device="cpu") -> BCQLinear:
    """A layer of random bits, for measuring and testing."""
    layer = BCQLinear(in_features, out_features, n_bits, group_size)
    layer.bit_planes.random_(-(2**31), 2**31)
    layer.alpha.uniform_(0.1, 1)
    layer.shift.normal_()
    return layer.to(device)


def medians(calls: dict[str, list[Callable]], device: torch.device, n_rounds: int) -> dict[str, float]:
    """Median seconds of one call. calls: by name, a list of calls that do the same with copies of their data.

    The names take turns, so that what slows the machine down hits them alike."""
    timer = seconds_cuda if device.type == "cuda" else seconds_cpu
    start = time.perf_counter()
    for same in calls.values():
        timer(same)  # warm up
    n_rounds = min(n_rounds, max(3, int(PATIENCE / (time.perf_counter() - start))))

    seconds = {name: [] for name in calls}
    for _ in range(n_rounds):
        for name, same in calls.items():
            seconds[name] += timer(same)
    return {name: statistics.median(values) for name, values in seconds.items()}


def seconds_cpu(calls: list[Callable]) -> list[float]:
    seconds = []
    for call in calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def seconds_cuda(calls: list[Callable]) -> list[float]:
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


def contestants(
    shape: tuple[int, int], n_bits: int, group_size: int, device: torch.device
) -> tuple[list[BCQLinear], dict[torch.dtype, list[torch.Tensor]]]:
    """Copies of one layer as bit-planes, and as ordinary weights in each dtype: more than a cache holds."""
    layer = random_layer(*shape, n_bits, group_size, device)
    size = sum(t.nbytes for t in layer.buffers())
    n_layers = min(100, 1 + int(CACHE // size))
    layers = [layer] + [random_layer(*shape, n_bits, group_size, device) for _ in range(n_layers - 1)]

    dtypes = [torch.float16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    n_weights = 1 + int(CACHE // (shape[0] * shape[1] * 2))
    weights = {t: [torch.randn(shape, device=device).to(t) for _ in range(n_weights)] for t in dtypes}
    return layers, weights


def call_of(layer: BCQLinear, x: torch.Tensor, path: str) -> Callable:
    """A product by one path, past the choice that `BCQLinear.forward` makes."""
    if path == "torch":
        return lambda: F.linear(x, layer.dequantize(x.dtype))
    return functools.partial(torch.ops.flexbcq.multiply.default, x, *layer.buffers(), layer.out_features, path)


def measure(
    shape: tuple[int, int],
    n_bits: int,
    group_size: int,
    batch_sizes: list[int],
    chosen: list[str],
    device: torch.device,
    n_rounds: int,
) -> list[dict]:
    """One row of the table per batch size and path: ours and F.linear, in turns, and a read of 256 MB."""
    out_features, in_features = shape
    layers, weights = contestants(shape, n_bits, group_size, device)
    size = sum(t.nbytes for t in layers[0].buffers())
    stream = torch.randn(2**26, device=device)

    rows = []
    for batch in batch_sizes:
        x = {dtype: torch.randn(batch, in_features, device=device, dtype=dtype) for dtype in weights}
        ours = x[next(iter(x))]
        calls = {path: [call_of(layer, ours, path) for layer in layers] for path in chosen}
        for dtype, copies in weights.items():
            calls[f"F.linear {str(dtype)[6:]}"] = [functools.partial(F.linear, x[dtype], w) for w in copies]
        seconds = medians(calls | {"read": [stream.sum]}, device, n_rounds)

        read = stream.nbytes / seconds["read"] / 1e9
        for path in chosen:
            speed, flop = size / seconds[path] / 1e9, 2 * batch * out_features * in_features
            row = {"out x in": f"{out_features} x {in_features}", "bits": n_bits, "batch": batch, "path": path}
            row |= {"us": f"{seconds[path] * 1e6:.{int(seconds[path] < 1e-4)}f}", "GB/s": f"{speed:.1f}"}
            row |= {"% of read": f"{100 * speed / read:.0f}", "GFLOP/s": f"{flop / seconds[path] / 1e9:.4g}"}
            for dtype in weights:
                name = f"F.linear {str(dtype)[6:]}"
                row[f"x {name}"] = f"{seconds[name] / seconds[path]:.3g}"
            rows.append(row | {"read GB/s": f"{read:.1f}"})
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Of the first shape: GB/s of weights against bits at the first batch size, below the read bandwidth as the roof;
    and GFLOP/s against the batch size at the middle number of bits."""
    rows = [row for row in rows if row["out x in"] == rows[0]["out x in"]]
    bits = list(dict.fromkeys(row["bits"] for row in rows))
    middle = bits[len(bits) // 2]
    figure = Figure(figsize=(10, 4), layout="constrained")
    reading, computing = figure.subplots(1, 2)
    looks = itertools.cycle(zip("osD^v", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")))

    for name, (marker, color) in zip(dict.fromkeys(row["path"] for row in rows), looks):
        ours, look = [row for row in rows if row["path"] == name], dict(marker=marker, color=color, label=name)
        points = [(row["bits"], float(row["GB/s"])) for row in ours if row["batch"] == rows[0]["batch"]]
        reading.plot(*zip(*points), **look)
        points = [(row["batch"], float(row["GFLOP/s"])) for row in ours if row["bits"] == middle]
        computing.plot(*zip(*points), **look)

    first = [row for row in rows if row["bits"] == middle and row["path"] == rows[0]["path"]]
    for name, style in zip((key for key in first[0] if key.startswith("x F.linear")), (":", "-.")):
        points = [(row["batch"], float(row["GFLOP/s"]) / float(row[name])) for row in first]
        computing.plot(*zip(*points), style, color="black", label=name[2:])

    roof = statistics.median(float(row["read GB/s"]) for row in rows)
    reading.axhline(roof, color="black", linestyle="--", label="read bandwidth")
    reading.set(xlabel="bits per weight (planes)", ylabel="weights read, GB/s", ylim=(0, None))
    reading.set(title=f"{rows[0]['out x in']}, tokens at once: {rows[0]['batch']}")
    reading.xaxis.get_major_locator().set_params(integer=True)
    computing.set(xlabel="tokens at once", ylabel="GFLOP/s", xscale="log", yscale="log")
    computing.set(title=f"{rows[0]['out x in']}, {middle} bits")
    for axes in (reading, computing):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def rows_x_columns(text: str) -> tuple[int, int]:
    """A shape, for argparse.

    >>> rows_x_columns("8192x28672")
    (8192, 28672)"""
    out_features, in_features = map(positive, text.split("x"))
    return out_features, in_features


def run(args: argparse.Namespace) -> None:
    device = check_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{name}, " + ("a row a group" if args.group_size == -1 else f"groups of {args.group_size}")

    found = paths(device.type)
    if args.paths and not set(args.paths) <= set(found):
        raise ValueError(f"--paths {' '.join(args.paths)}: this machine offers {', '.join(found)}")
    chosen = args.paths or [path for path in found if path in USEFUL] or found[:1]

    rows, jobs = [], list(itertools.product(args.shapes, args.bits))
    with torch.inference_mode():
        for shape, n_bits in tqdm(jobs, unit="weight", leave=False):
            rows += measure(shape, n_bits, args.group_size, args.batch, chosen, device, args.rounds)

    lines = [list(rows[0]), ["---:"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    table = f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    print(table)
    Path(args.out + ".md").write_text(table, "utf-8")
    plot(rows, Path(args.out + ".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the kernels of this machine against F.linear.")
    add = parser.add_argument
    shapes, batches = [(8192, 28672), (14336, 4096)], [1, 2, 4, 8, 64, 512]
    add("--shapes", nargs="+", type=rows_x_columns, default=shapes, help="(default: 8192x28672 14336x4096)")
    add("--bits", nargs="+", type=int, default=[2, 3, 4], help="(default: 2 3 4)")
    add("--batch", nargs="+", type=positive, default=batches, help="tokens at once (default: 1 2 4 8 64 512)")
    add("--paths", nargs="+", choices=NAMES, metavar="PATH", help="kernels (default: all that are of use here)")
    add("--group-size", type=int, default=128, help="-1: a row (default: %(default)s)")
    add("--device", default=default_device(), help="(default: %(default)s)")
    add("--rounds", type=positive, default=15, help="measurements of each; the median counts (default: %(default)s)")
    add("--out", default="benchmark", help="write OUT.md and OUT.png (default: %(default)s)")
    guarded(run, parser)


if __name__ == "__main__":
    main()
