"""Random inputs that a model is likely to take: for tracing it, and for comparing two forms of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.specs import TensorSpec

# Names that people give to the axis along which samples are stacked.
_BATCH_NAMES = ("batch", "n", "b", "bs", "batch_size", "batchsize", "unk__0", "dim_0")


def symbols_of(specs: Sequence[TensorSpec]) -> list[str]:
    """Names of the dynamic dimensions, in order of appearance, each once."""
    return list(dict.fromkeys(dim for spec in specs for dim in spec.shape if isinstance(dim, str)))


def batch_symbols(specs: Sequence[TensorSpec]) -> list[str]:
    """Dynamic dimensions that count samples: named so, or the first axis of the first input that has one."""
    symbols = symbols_of(specs)
    named = [name for name in symbols if name.lower() in _BATCH_NAMES]
    if named:
        return named
    first = next((spec.shape[0] for spec in specs if len(spec.shape) > 1), None)
    return [first] if isinstance(first, str) else []


def example_feeds(
    specs: Sequence[TensorSpec], sizes: Mapping[str, int], *, batch: int | None = None, seed: int = 0
) -> Feeds:
    """One array per input. `sizes`: extent of each dynamic dimension ("": of unnamed ones); `batch`: of sample axes.

    Floating-point inputs are standard normal. Integers are 0 or 1: ids within any vocabulary, values of any mask.
    """
    rng = np.random.default_rng(seed)
    sizes = dict(sizes)
    if batch is not None:
        sizes |= dict.fromkeys(batch_symbols(specs), batch)
    return {spec.name: _array(spec, sizes, batch or 1, rng) for spec in specs}


def _array(spec: TensorSpec, sizes: Mapping[str, int], unknown: int, rng: np.random.Generator) -> Array:
    inner = sizes.get("", unknown)
    shape = [_extent(dim, inner if axis else unknown, sizes) for axis, dim in enumerate(spec.shape)]
    if spec.dtype == "bfloat16":
        import ml_dtypes

        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape), dtype=dtype)
    return np.asarray(rng.integers(0, 2, shape), dtype=dtype)


def _extent(dim: int | str | None, unknown: int, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else unknown if dim is None else sizes[dim]
