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

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count() -> int:
    """How many items `map_in_order` works on at a time."""
    return min(available_cores(), MAX_WORKERS)


def map_in_order(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Generator[_Result]:
    """`function` of each item, by threads, of which each takes one item at a time.

    At most `MAX_WORKERS` items are looked ahead, so that memory does not grow with their number. `function` should
    release the interpreter's lock, as runs of onnxruntime and torch do. Raises what `function` raises.
    """
    workers = worker_count()
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
