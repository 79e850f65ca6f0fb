"""Processes by id and start: an id alone is soon another process's, above all in a container that starts again."""

import psutil

SAME_START_S = 2.0  # the clock that start times are told by is set now and then


def this() -> str:
    """Id and start, in seconds since the epoch, of this process.

    >>> is_alive(this())
    True
    """
    process = psutil.Process()
    return f"{process.pid} {process.create_time():.2f}"


def is_alive(name: str) -> bool:
    """Whether the process on this machine that gave `name` as `this()` still runs.

    >>> process = psutil.Process()
    >>> is_alive(f"{process.pid} {process.create_time() - 60:.2f}")
    False
    """
    pid, _, started = name.partition(" ")
    try:
        process = psutil.Process(int(pid))
        is_same = not started or abs(process.create_time() - float(started)) < SAME_START_S
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
