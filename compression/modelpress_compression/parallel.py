"""The same work on many samples, on several cores at once: results come in the order of the samples.

Single-threaded runs side by side keep all cores busy, where the threads of one run would wait for each other at every
operator; on a machine that does other work as well, such waiting takes several times the work itself.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

# Each run at a time holds activations of its own; more cores than this gain little beside that memory.
MAX_WORKERS = 4
# What `map_ahead` lets results take that wait or are being made.
AHEAD_BYTES = 256 * 1024**2  # 256 MiB

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count() -> int:
    """How many items `map_in_order` works on at a time."""
    return min(available_cores(), MAX_WORKERS)


def workers_within(limit_bytes: int, item_bytes: float) -> int:
    """How many items may be worked on at a time that each hold so much meanwhile; one at least."""
    return max(1, min(worker_count(), int(limit_bytes // max(1, item_bytes))))


def map_in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int | None = None
) -> Generator[_Result]:
    """`function` of each item, by threads, of which each takes one item at a time.

    At most `MAX_WORKERS` items are looked ahead, so that memory does not grow with their number; `workers`: how many
    work, `worker_count` where None. `function` should release the interpreter's lock, as runs of onnxruntime and torch
    do. Raises what `function` raises.
    """
    workers = worker_count() if workers is None else workers
    if workers == 1:
        yield from map(function, items)
        return
    pending: deque[Future[_Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # A caller that stops early, or an error, leaves nothing running.
        pool.shutdown(cancel_futures=True)


def map_ahead(
    function: Callable[[_Item], _Result], items: Iterable[_Item], bytes_of: Callable[[_Result], int]
) -> Generator[_Result]:
    """`map_in_order` for results that may be large: one item at a time where the first result says that several would
    take more than `AHEAD_BYTES`.

    While the caller works on one result, the next ones are made.
    """
    items, several = iter(items), False
    for item in items:
        result = function(item)
        several = (worker_count() + 1) * bytes_of(result) <= AHEAD_BYTES
        yield result
        break
    else:
        return
    del result  # it is the caller's alone now
    yield from map_in_order(function, items) if several else map(function, items)
