"""Why a worker was lost, for people and for programs."""

from __future__ import annotations

import signal

from modelpress_server.executors.base import WorkerLostError

# A C++ library that runs out of memory ends the process with this on its lips.
_OUT_OF_MEMORY_LINES = ("bad_alloc", "cannot allocate memory", "out of memory", "MemoryError")


def is_out_of_memory_line(line: str) -> bool:
    """Whether a line of a dying worker says that memory was short."""
    return any(text in line for text in _OUT_OF_MEMORY_LINES)


def out_of_memory(limit_bytes: int) -> WorkerLostError:
    """It took more memory than it may."""
    limit = f"{limit_bytes / 2**30:.1f} GiB" if limit_bytes else "there is"
    return WorkerLostError(
        "WORKER_OUT_OF_MEMORY",
        f"The task needs more memory than {limit}, which is what a worker may use. Take a smaller model, smaller batch "
        "sizes or fewer samples, or raise the server's worker memory limit.",
    )


def too_slow(limit_s: float) -> WorkerLostError:
    """It ran longer than it may."""
    return WorkerLostError(
        "WORKER_TIMEOUT",
        f"The task did not end within {limit_s:g} s and was stopped. Give it more time, take fewer samples, or leave "
        "out the slowest step.",
    )


def crashed(status: int) -> WorkerLostError:
    """It ended without a terminal event; `status` as of subprocess: negative for a signal."""
    if status == -signal.SIGKILL:
        how = "was killed (SIGKILL), perhaps because the machine ran out of memory"
    elif status < 0:
        how = f"was ended by {_signal_name(-status)}"
    else:
        how = f"ended early with status {status}"
    return WorkerLostError("WORKER_CRASHED", f"The worker process {how}.")


def broken_protocol() -> WorkerLostError:
    """What it sent is not the protocol."""
    return WorkerLostError(
        "WORKER_CRASHED", "The worker process sent what is no message of the protocol; it was stopped."
    )


def not_started() -> WorkerLostError:
    """No worker could be started."""
    return WorkerLostError("WORKER_CRASHED", "A worker process could not be started; the server's log says why.")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
