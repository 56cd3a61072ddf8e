"""One run at a time in an output directory."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["RunInUseError", "run_lock"]

logger = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)


class RunInUseError(OSError):
    """Another process trains in the directory."""


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold an output directory for the length of the block.

    The lock is the operating system's (POSIX record lock): it ends with the process, however that
    ends, and forked workers do not inherit it. On a file system without locks a warning says that
    nothing is guarded. One process may hold a directory twice.

    Raises:
        RunInUseError: another process holds it; the message names that process.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK_FILE
    descriptor = _locked(path)
    try:
        yield
    finally:
        if descriptor is not None:
            # While the lock is held, so that nobody else can be holding what is removed.
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _locked(path: Path) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            if error.errno in _TAKEN:
                raise RunInUseError(
                    f"{path.parent} is in use by another run ({holder or 'just starting'}); two "
                    "runs would overwrite each other's checkpoints"
                ) from error
            logger.warning("%s cannot be locked (%s): make sure only one run uses it", path, error)
            return None
        if _is_current(path, descriptor):
            holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
            return descriptor
        # The run that held it has just ended and removed the file: lock the new one.
        os.close(descriptor)


def _is_current(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
