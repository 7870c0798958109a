"""What all command lines have in common: the choice of a device, and errors of one line."""

import argparse
import sys
from typing import Callable

import torch

import parallel


def check_device(name: str) -> torch.device:
    """Raises ValueError if PyTorch cannot use this device here."""
    try:
        probe = torch.zeros(1, device=name)
        probe.item()
        return probe.device  # of "cuda" with its number
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def guarded(run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse the command line and run; whatever is the user's to mend ends in one line on stderr and exit code 2."""
    parser.error = lambda message: sys.exit(fail(message))
    try:
        for word in sys.argv:
            if word != word.encode(errors="replace").decode():
                raise ValueError(f"{word!r}: not UTF-8")
        run(parser.parse_args())
        parallel.stop()
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(fail(error))
    except RuntimeError as error:
        # PyTorch has a type of its own for want of memory on GPUs only, and none for another process that ended
        if "allocate memory" not in str(error) and parallel.world() == 1:
            raise
        sys.exit(fail(error))
    except KeyboardInterrupt as error:
        error.args = ("interrupted",)
        sys.exit(fail(error, code=130))


def fail(error: object, code: int = 2) -> int:
    """One line, whatever the message holds, with the notes that were added to the error on its way."""
    parts = str(error) or "out of memory", *getattr(error, "__notes__", ())
    parallel.report("\nerror: " + " ".join("; ".join(parts).split()))
    return code
