"""Some entries of an array that may be a file larger than memory: read where they are asked for, and not before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def picked(array: Array, rows: slice | NDArray[np.int64]) -> Array:
    """These entries of the first axis: a view where they are a slice, else a `Picked` in its place."""
    if isinstance(array, Picked):
        return cast("Array", Picked(array.source, array.rows[rows]))
    return array[rows] if isinstance(rows, slice) else cast("Array", Picked(array, rows))


class Picked:
    """Indexed as the array of these entries would be, and one to NumPy; an index copies what it asks for."""

    def __init__(self, source: Array, rows: NDArray[np.int64]) -> None:
        self.source, self.rows = source, rows
        self.dtype, self.ndim = source.dtype, source.ndim
        self.shape = (len(rows), *source.shape[1:])
        self.nbytes = len(rows) * (source.nbytes // max(1, len(source)))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return (self.source[row] for row in self.rows)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index] if isinstance(index, tuple) else self.source[self.rows[index]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.source[self.rows], dtype)
