"""Why a worker was lost, for people and for programs."""

from __future__ import annotations

import signal

from modelpress_server.executors.base import WorkerLostError

CRASHED = "WORKER_CRASHED"
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


def out_of_disk(limit_bytes: int) -> WorkerLostError:
    """It wrote more than it may."""
    return WorkerLostError(
        "WORKER_OUT_OF_DISK",
        f"The task wrote more than {limit_bytes / 2**20:.0f} MiB to the disk, far more than its model and its data "
        "explain, and was stopped. Send fewer samples, or data that is not compressed so much.",
    )


def too_slow(limit_s: float) -> WorkerLostError:
    """It ran longer than it may."""
    return WorkerLostError(
        "WORKER_TIMEOUT",
        f"The task did not end within {limit_s:g} s and was stopped. Give it more time, take fewer samples, or leave "
        "out the slowest step.",
    )


def crashed(status: int, *, beside_larger: bool = False) -> WorkerLostError:
    """It ended without a terminal event; `status` as of subprocess: negative for a signal.

    `beside_larger`: another worker held more memory. The kernel kills when memory runs out, and this one did not use it
    up.
    """
    if status == -signal.SIGKILL and beside_larger:
        how = "was killed (SIGKILL) while another one used more memory"
        return WorkerLostError(CRASHED, f"The worker process {how}.", own=False)
    if status == -signal.SIGKILL:
        how = "was killed (SIGKILL), perhaps because the machine ran out of memory"
    elif status < 0:
        how = f"was ended by {_signal_name(-status)}"
    else:
        how = f"ended early with status {status}"
    return WorkerLostError(CRASHED, f"The worker process {how}.")


def orphaned() -> WorkerLostError:
    """The process that it was forked from has ended, and the kernel killed it for that."""
    return WorkerLostError(
        CRASHED, "The process that workers are forked from has ended, and this one with it.", own=False
    )


def broken_protocol() -> WorkerLostError:
    """What it sent is not the protocol."""
    return WorkerLostError(CRASHED, "The worker process sent what is no message of the protocol; it was stopped.")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
