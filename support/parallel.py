"""Several processes, started by PyTorch's own launcher: torchrun --nproc-per-node N calibrate.py ...

Each process has a GPU (or works on the CPU), holds every N-th calibration sequence and takes the same steps; gradients
and losses are averaged over the processes, so N of them do what one does with the same --batch-size, only sooner.
Perplexities are shared in the same way. Only process 0 writes and prints, except for errors. Without torchrun there is
one process, and the functions here do nothing.
"""

import os
import sys
import traceback
from datetime import timedelta
from typing import Any, Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def own_device(device: str) -> str:
    """The device of this process. Process k of a machine takes GPU k, whichever GPU was asked for."""
    if dist.is_torchelastic_launched() and device.partition(":")[0] == "cuda":
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def backends(device_type: str) -> str:
    """The backends that carry tensors: NCCL on a GPU, gloo on a CPU, where numbers such as a loss are too.

    By default PyTorch takes only the one for the machine's accelerator, even if the accelerator is not used."""
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def start(device_type: str) -> None:
    """Join the other processes."""
    if dist.is_torchelastic_launched():
        sys.excepthook = lambda *error: report("".join(traceback.format_exception(*error)))
        dist.init_process_group(backends(device_type), timeout=timedelta(days=1))  # process 0 may take its time
        if rank():
            sys.stdout = sys.stderr = open(os.devnull, "w")


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

    def __init__(self, n_samples: int, batch_size: int, epochs: int, seed: int, device: str | torch.device = "cpu"):
        """n_samples: those of this process; batch_size: of all processes together; device: where the numbers are drawn
        (a CPU and a GPU draw different ones)"""
        seeds = [seed * batch_size + place for place in range(rank(), batch_size, world())]
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]  # for the samples, which are on the host
        on_host = torch.device(device).type == "cpu"
        self.mixers = self.generators if on_host else [torch.Generator(device).manual_seed(s) for s in seeds]
        self.epochs, self.steps_per_epoch = epochs, n_samples // len(seeds)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Callable]]:
        n = len(self.generators)
        for _ in range(self.epochs):
            orders = [torch.randperm(self.steps_per_epoch, generator=g) * n + c for c, g in enumerate(self.generators)]
            for chosen in torch.stack(orders, dim=1):  # (samples in the step,)
                yield chosen, self.uniform

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in self.mixers])


# -------------------------------------------------------------------------------------------------- sharing the results


def total(x: float) -> float:
    """The sum over the processes."""
    found = torch.tensor(x, dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(found)
    return found.item()


def mean(x: float) -> float:
    """The average over the processes."""
    return total(x) / world()


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


def agree_on(content: Any) -> Any:
    """What process 0 has for `content`; anything that can be pickled."""
    found = [content]
    if world() > 1:
        dist.broadcast_object_list(found, 0, device=torch.device("cpu"))
    return found[0]


def is_lost(error: Exception) -> bool:
    """Whether the error only says that another process has ended."""
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def report(text: str) -> None:
    """Print an error on stderr; with several processes, only the first to fail does. torchrun then ends the others."""
    if not dist.is_torchelastic_launched():
        print(text, file=sys.stderr)
    elif is_first_error():
        print(text, file=sys.__stderr__, flush=True)


def is_first_error() -> bool:
    """Whether no other process has had one. True, too, if torchrun, which counts them, is gone or does not answer."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        name = f"errors {os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=3)).add(name, 1) == 1
    except Exception:
        return True
