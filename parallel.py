"""Several processes on one machine, started by PyTorch's own launcher: torchrun --nproc-per-node N calibrate.py ...

With a GPU each. Every process holds every N-th calibration sequence and takes the same steps; gradients and losses are
averaged over the processes, so N of them do what one does with the same --batch-size, only sooner. Process 0 alone
writes and prints. Without torchrun there is one process, and nothing here does anything.
"""

import os
import sys
from datetime import timedelta
from typing import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: str) -> str:
    """Join the other processes. Returns the device of this one: of several GPUs, that of its number."""
    if dist.is_torchelastic_launched():
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        dist.init_process_group(timeout=timedelta(days=1))  # gloo on the CPU, NCCL on GPUs; process 0 may take its time
        if rank():
            sys.stdout = sys.stderr = open(os.devnull, "w")
    return device


def stop() -> None:
    """Leave together."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(x: float) -> float:
    """The average over the processes."""
    if world() == 1:
        return x
    total = torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / world()


def share(x: Tensor) -> Tensor:
    """The samples of this process, of x: (samples, ...)."""
    return x[rank() :: world()]


def wait() -> None:
    """Until all processes have come here."""
    mean(0.0)


def average(tensors: Iterable[Tensor]) -> None:
    """Every process ends up with the averages."""
    if world() > 1:
        for t in tensors:
            dist.all_reduce(t)
            t /= world()


def agree(tensors: Iterable[Tensor]) -> None:
    """Every process ends up with those of process 0."""
    if world() > 1:
        for t in tensors:
            dist.broadcast(t, 0)


def report(line: str) -> None:
    """An error on stderr, by the first process that has one: torchrun then ends the others."""
    if not dist.is_torchelastic_launched():
        print(line, file=sys.stderr)
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if store.add("errors", 1) == 1:
        print(line, file=sys.__stderr__)
