"""What all programs have in common: a device and its precision, and errors of one line."""

import argparse
import os
import sys
from contextlib import contextmanager
from typing import Callable, Iterator

import torch

from support import interrupt, parallel


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> torch.device:
    """The device of this name, "cuda" with its number, made the current one. Raises ValueError if it cannot be used.

    It must know float64, which the initialization computes in: Apple's GPUs (mps) do not, and are refused."""
    try:
        probe = torch.zeros(1, dtype=torch.float64, device=name)
        probe.item()
        if probe.is_cuda:
            torch.cuda.set_device(probe.device)  # a stream or a CUDA graph is that of the current device
        return probe.device
    except (RuntimeError, AssertionError, TypeError) as error:
        said = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(f"--device {name}: not usable here ({said})") from None


@contextmanager
def coarse_products(device: torch.device) -> Iterator[None]:
    """While this is open, a GPU rounds the operands of matrix products to 10 bits (TF32), as cuBLAS offers it: seven
    times as fast on an H100. Additions stay in float32; on a CPU nothing changes."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Tolerant:
    """A stream for progress and errors that may be closed or full: what it cannot take is lost, and the run goes on."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            pass

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def guarded(run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse the command line and run. An error the user can fix is printed as one line on stderr, exit code 2."""
    interrupt.hand_over()
    sys.stderr = Tolerant(sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that takes ASCII only loses no result

    parser.error = lambda message: sys.exit(fail(message))  # instead of argparse's two lines
    try:
        for word in sys.argv:
            if word != word.encode(errors="replace").decode():
                raise ValueError(f"{word!r}: not UTF-8")
        run(parser.parse_args())
        parallel.stop()

    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(fail(error))
    except RuntimeError as error:
        # PyTorch raises a plain RuntimeError when the CPU's memory runs out and when another process dies
        if "allocate memory" not in str(error) and not parallel.is_lost(error):
            raise
        sys.exit(fail(error))
    except KeyboardInterrupt as error:
        error.args = ("interrupted",)
        sys.exit(fail(error, code=130))


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put a name before the message of a ValueError that is raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def fail(error: object, code: int = 2) -> int:
    """Print one line, whatever the message holds, with the notes that were added to the error on its way."""
    unsaid = "out of memory" if isinstance(error, MemoryError) else repr(error)
    sentences = str(error) or unsaid, *getattr(error, "__notes__", ())
    parallel.report("\nerror: " + " ".join("; ".join(sentences).split()))
    return code
