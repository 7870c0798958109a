"""Ctrl-C while Python still reads the libraries, which takes seconds: one line, too. Programs import this first."""

import os
import signal
import sys


def stop(*_) -> None:
    """Leave at once: an exception would be raised, and sometimes lost, in the middle of a library."""
    print("\nerror: interrupted", file=sys.stderr)
    os._exit(130)


def hand_over() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, as usual."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background of a shell
    signal.signal(signal.SIGINT, stop)
