"""Processes by id and start: an id alone is soon another process's, above all in a container that starts again."""

import psutil

SAME_START_S = 2.0  # more than rounding, and far less than it takes until an id is given again


def this() -> str:
    """Id and start of this process.

    >>> is_alive(this())
    True
    """
    process = psutil.Process()
    return f"{process.pid} {_start_s(process):.2f}"


def is_alive(name: str) -> bool:
    """Whether the process on this machine that gave `name` as `this()` still runs.

    >>> process = psutil.Process()
    >>> is_alive(f"{process.pid} {_start_s(process) - 60:.2f}")
    False
    """
    pid, _, started = name.partition(" ")
    try:
        process = psutil.Process(int(pid))
        is_same = not started or abs(_start_s(process) - float(started)) < SAME_START_S
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start_s(process: psutil.Process) -> float:
    """Start of `process`: on Linux in seconds since the machine's, which setting the clock does not move."""
    return process.create_time() - (psutil.boot_time() if psutil.LINUX else 0.0)
