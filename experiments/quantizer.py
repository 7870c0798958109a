"""Measure initialization and a training step of one weight matrix: seconds, and peak bytes per weight.

    python -m experiments.quantizer

The peak is resident memory, so it includes what the allocator keeps.
"""

import argparse
import multiprocessing
import time

import torch

from flexbcq import FlexBCQLinear, initialize
from kernel import columns_per_group
from support.command import guarded
from support.plan import peak_bytes
from support.settings import Settings


def measure_initialization(n_ratios: int, size: int, n_bits: int, group_size: int) -> tuple[float, float]:
    """Seconds and peak bytes per weight, for one (size, size) weight. Meant for a process of its own."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).view(-1, group_size)
    initialize(weight[:64], n_bits, 1, 1)  # load the libraries
    before, start = peak_bytes(), time.perf_counter()
    initialize(weight, n_bits, n_ratios, Settings.n_rounds)
    return time.perf_counter() - start, (peak_bytes() - before) / size**2


def measure_training(n_layers: int, size: int, n_bits: int, group_size: int) -> tuple[float, float]:
    """Seconds of one forward and backward of one layer, with a new mapping every second time, and peak bytes per weight
    of training a chain of n_layers, Adam and the weights themselves included. Meant for a process of its own."""
    train_chain(1, 64, n_bits, 64)  # load the libraries
    before = peak_bytes()
    seconds = train_chain(n_layers, size, n_bits, group_size)
    return seconds, (peak_bytes() - before) / (n_layers * size**2)


def train_chain(n_layers: int, size: int, n_bits: int, group_size: int) -> float:
    """Train a chain of random layers for ten steps. Returns median seconds of a step for one layer."""
    torch.manual_seed(0)
    chain = [FlexBCQLinear(torch.randn(size, size).bfloat16(), n_bits, group_size, n_ratios=1) for _ in range(n_layers)]
    optimizer = torch.optim.Adam([p for layer in chain for p in layer.parameters()], lr=1e-4, fused=True)
    seconds = []
    for step in range(10):
        start, y = time.perf_counter(), torch.ones(1, size)
        for layer in chain if step % 2 == 0 else ():
            layer.remap()
        for layer in chain:
            y = layer(y)
        y.sum().backward()
        seconds.append((time.perf_counter() - start) / n_layers)
        optimizer.step()
        optimizer.zero_grad()
    return sum(sorted(seconds)[4:6]) / 2  # every second step also remaps, so average the two middle values


def run(args: argparse.Namespace) -> None:
    group_size = columns_per_group(args.size, args.group_size)
    print(f"one {args.size} x {args.size} weight, groups of {group_size}, {torch.get_num_threads()} threads")
    jobs = [(f"initialization, n_ratios={n}", measure_initialization, n) for n in (1, 10, 50)]
    jobs += [("forward + backward", measure_training, 4)]
    for n_bits in (3, 4):
        for name, measure, n in jobs:
            with multiprocessing.get_context("spawn").Pool(1) as fresh:  # a process of its own has a peak of its own
                seconds, peak = fresh.apply(measure, (n, args.size, n_bits, group_size))
            print(f"{n_bits} bits  {name:27} {seconds:7.3f} s  {peak:5.1f} bytes per weight at the peak", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure initialization and a training step of one weight matrix.")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=-1, help="-1: a row (default: %(default)s)")
    guarded(run, parser)


if __name__ == "__main__":
    main()
