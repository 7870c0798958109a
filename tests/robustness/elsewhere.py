"""Run a program of this repository as if on another system: python elsewhere.py calibrate.py --bits 2 ...

What Windows or macOS lacks is taken away before anything else is imported, and no folder can be opened or synced."""

import os
import runpy
import shutil
import stat
import sys
from pathlib import Path

import psutil  # noqa: F401  has a version for every system; the one for this needs what is taken away below

ROOT = Path(__file__).parent.parent.parent


def take_away() -> None:
    for name in ("fcntl", "resource", "termios", "pwd"):
        sys.modules[name] = None  # `import fcntl` raises ImportError
    del os.posix_fallocate, os.sysconf
    open_file, sync_file = os.open, os.fsync

    def open_no_folder(path, flags, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return open_file(path, flags, *arguments, **options)

    def sync_no_folder(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        sync_file(descriptor)

    os.open, os.fsync = open_no_folder, sync_no_folder
    shutil._use_fd_functions = False  # where folders cannot be opened, rmtree walks by name


if __name__ == "__main__":
    take_away()
    sys.path.insert(0, str(ROOT))
    sys.argv.pop(0)
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
