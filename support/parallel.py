"""Several processes on one machine, started by PyTorch's own launcher: torchrun --nproc-per-node N calibrate.py ...

Each process has a GPU, holds every N-th calibration sequence and takes the same steps; gradients and losses are
averaged over the processes, so N of them do what one does with the same --batch-size, only sooner. Process 0 alone
writes and prints. Without torchrun there is one process, and nothing here does anything.
"""

import os
import sys
from datetime import timedelta
from typing import Callable, Iterable, Iterator

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


# ------------------------------------------------------------------------------------------------- sharing the samples


def share(x: Tensor) -> Tensor:
    """The samples of this process, of x: (samples, ...)."""
    return x[rank() :: world()]


class Draws:
    """The random choices of every training step: which of its samples this process takes, and a function that draws
    uniform numbers in [0, 1) for them: (...) -> (samples in the step, ...).

    Every place in the batch has its own samples and its own generator: place c takes samples c, c + batch_size, c + 2
    batch_size, ... Processes that divide the places among them therefore draw together what a single process draws."""

    def __init__(self, n_samples: int, batch_size: int, epochs: int, seed: int):
        """n_samples: those of this process; batch_size: of all processes together."""
        places = range(rank(), batch_size, world())
        self.generators = [torch.Generator().manual_seed(seed * batch_size + place) for place in places]
        self.epochs, self.steps_per_epoch = epochs, n_samples // len(places)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Callable]]:
        n = len(self.generators)
        for _ in range(self.epochs):
            orders = [torch.randperm(self.steps_per_epoch, generator=g) * n + c for c, g in enumerate(self.generators)]
            for chosen in torch.stack(orders, dim=1):  # (samples in the step,)
                yield chosen, self.uniform

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators])


# -------------------------------------------------------------------------------------------------- sharing the results


def mean(x: float) -> float:
    """The average over the processes."""
    if world() == 1:
        return x
    total = torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / world()


def wait() -> None:
    """Wait until all processes have come here."""
    mean(0.0)


def average(tensors: Iterable[Tensor]) -> None:
    """Replace the tensors of every process by the averages over the processes."""
    if world() > 1:
        for t in tensors:
            dist.all_reduce(t)
            t /= world()


def agree(tensors: Iterable[Tensor]) -> None:
    """Replace the tensors of every process by those of process 0."""
    if world() > 1:
        for t in tensors:
            dist.broadcast(t, 0)


def report(line: str) -> None:
    """Print an error on stderr; of several processes, only the first that has one. torchrun then ends the others."""
    if not dist.is_torchelastic_launched():
        print(line, file=sys.stderr)
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if store.add("errors", 1) == 1:
        print(line, file=sys.__stderr__)
