"""Looking at something again and again while a block runs, from a thread beside it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

POLL_S = 0.02


class Sampled(ABC):
    """Looks every `POLL_S` while its block runs, and once more at the end."""

    def __enter__(self) -> Self:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            self.look()
        self.look()

    @abstractmethod
    def look(self) -> None:
        """Takes down what is seen now."""


class Largest(Sampled):
    """The largest that was seen of a figure."""

    def __init__(self, figure: Callable[[], int]) -> None:
        self.largest, self._figure = 0, figure

    def look(self) -> None:
        self.largest = max(self.largest, self._figure())
