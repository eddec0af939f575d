"""What the machine lacks for the moment: errors that pass by themselves, and so must not end a job or an upload.

disk                            ENOSPC, EDQUOT                              -> StorageFullError
descriptors, processes, memory  EMFILE, ENFILE, EAGAIN, ENOMEM, ENOBUFS     -> ServerBusyError
"""

from __future__ import annotations

import errno

from modelpress_server.errors import ServerBusyError, ServiceError, StorageFullError

FULL = (errno.ENOSPC, errno.EDQUOT)
_BUSY = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS)
# Python says it so where the kernel gives no more threads.
_NO_THREAD = "can't start new thread"
MAKE_ROOM = "Delete models and jobs that are no longer needed, or ask the server's operator for space."
BUSY_RETRY_S = 5.0
# The disk is full when it has less than this, whatever the reserve is.
FULL_BYTES = 64 * 1024


def storage_full() -> StorageFullError:
    """There is no room on the disk."""
    return StorageFullError(f"The server's disk is full; what was sent last is not stored. {MAKE_ROOM}")


def server_busy() -> ServerBusyError:
    """There are no descriptors, processes or memory left."""
    return ServerBusyError(
        "The server is short of descriptors, processes or memory for the moment. Try again shortly.",
        retry_after_s=BUSY_RETRY_S,
    )


def shortage_of(error: BaseException) -> ServiceError | None:
    """The error as a shortage that passes; None: it is something else."""
    if isinstance(error, StorageFullError | ServerBusyError):
        return error
    if isinstance(error, OSError) and error.errno in FULL:
        return storage_full()
    short = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _BUSY)
    if short or (isinstance(error, RuntimeError) and _NO_THREAD in str(error)):
        return server_busy()
    return None
