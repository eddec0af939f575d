"""Runs of the original that its ONNX form must repeat: sizes for its dynamic dimensions are found by trying.

A TorchScript archive says nothing of its inputs' shapes, and a hint such as `x:float32[batch,3,H,W]` leaves `H` and `W`
open. A convolutional net takes some sizes only, so likely ones are tried until the original runs.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.specs import TensorSpec, check_elements

Run = Callable[[Feeds], list[Array]]
# (extents of the dynamic dimensions, the one that leads) -> extents that go together; "": none leads.
Tie = Callable[[Mapping[str, int], str], Mapping[str, int]]

# Names that people give to the axis along which samples are stacked.
_BATCH_NAMES = ("batch", "n", "b", "bs", "batch_size", "batchsize", "unk__0", "dim_0")
_SIZES = (32, 224, 28, 64, 16, 128, 8, 48, 256, 299, 320, 512, 100, 384, 4, 640, 1024, 16000)
_FEW_SIZES = (32, 224, 64, 16, 8, 128, 3, 1)  # for several dimensions that cannot be the same
_TRIES = 200
_SEARCH_S = 90.0
_MAX_ELEMENTS = 1 << 21  # of all inputs together; larger ones are not needed to trace a model
# Scalars of integer type are options rather than data: a sample rate, a step, a flag.
_SCALARS = (None, 1, 16000, 8000, 2)
_TRACE_BATCH = 2  # never 1, which exporters take for a constant
_FIRST_BATCHES = (_TRACE_BATCH, 1, 4, 8)  # the last two: for models that split their batch
_OTHER_BATCHES = (3, 1, 2, 4, 8, 16)
# How lines of torch's messages start that tell of its own insides.
_NOISE = ("File ", "Traceback", "~", "<---", "The following", "at ", "(Refer to", "Use tlparse")
_WHERE = "\nWhile executing "  # behind it torch shows the user's source
_LONGEST_CHAIN = 20
# What torch.onnx says of an operator that it lacks, and of the node that calls it.
_NO_FUNCTION = "No ONNX function found"
_COMPLEX = "complex-valued"
_NODE = re.compile(r"target=torch\.ops\.(?P<library>\w+)\.(?P<operator>\w+)")


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
    specs: Sequence[TensorSpec], sizes: Mapping[str, int], *, batch: int | None = None, seed: int = 0, least: int = 0
) -> Feeds:
    """One array per input. `sizes`: extent of each dynamic dimension ("": of unnamed ones); `batch`: of sample axes.

    Floating-point inputs are standard normal. Integers are `least` or one more, by default 0 or 1: ids within any
    vocabulary, values of any mask; a mask of two dimensions hides the end.
    """
    rng = np.random.default_rng(seed)
    sizes = dict(sizes)
    if batch is not None:
        sizes |= dict.fromkeys(batch_symbols(specs), batch)
    return {spec.name: _array(spec, sizes, batch or 1, rng, least) for spec in specs}


def _array(spec: TensorSpec, sizes: Mapping[str, int], unknown: int, rng: np.random.Generator, least: int) -> Array:
    inner = sizes.get("", unknown)
    shape = [_extent(dim, inner if axis else unknown, sizes) for axis, dim in enumerate(spec.shape)]
    if spec.dtype == "bfloat16":
        import ml_dtypes

        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    dtype = spec.array_dtype
    if dtype.kind in "ib" and len(shape) == 2 and "mask" in spec.name.lower():
        # As padded on the right: where the first place is masked, a causal model sees nothing, and gives anything.
        lengths = rng.integers(1, max(shape[1], 1) + 1, (shape[0], 1))
        kept = np.arange(shape[1]) < lengths
        # Numbers say what to keep, flags of torch's layers what to leave out.
        return np.asarray(kept if dtype.kind == "i" else ~kept, dtype=dtype)
    if dtype.kind == "f":
        values = rng.standard_normal(shape)
        if "box" in spec.name.lower() and shape[-1:] == [4]:
            values[..., 2:] = values[..., :2] + np.abs(values[..., 2:])  # x1, y1, x2, y2: no box is turned inside out
        return np.asarray(values, dtype=dtype)
    low = least if dtype.kind in "iu" else 0
    return np.asarray(rng.integers(low, low + 2, shape), dtype=dtype)


def _extent(dim: int | str | None, unknown: int, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else unknown if dim is None else sizes[dim]


@dataclass(frozen=True)
class TrialRun:
    """One run of the original: extents of the dynamic dimensions, what went in, what came out."""

    sizes: Mapping[str, int]
    feeds: Feeds
    expected: list[Array]


@dataclass(frozen=True)
class TrialRuns:
    """`runs[0]` is the one to trace with. `warnings` say which dimensions turned out not to be dynamic."""

    runs: tuple[TrialRun, ...]
    warnings: tuple[str, ...] = ()


def _untied(sizes: Mapping[str, int], lead: str) -> Mapping[str, int]:
    return sizes


def find_trials(
    run: Run, specs: Sequence[TensorSpec], refusals: tuple[type[Exception], ...], tie: Tie = _untied
) -> TrialRuns:
    """Runs of the original at several sizes. `run` raises one of `refusals` where the original does not take an input;
    `tie` knows which sizes it takes together.

    Raises InvalidInputsError, with what the original said, where it takes none, or only one batch size.
    """
    check_elements(specs)
    if words := [spec.name for spec in specs if spec.dtype == "string"]:
        raise InvalidInputsError(f"Input {words[0]!r} holds strings, which torch has no tensors of.")
    search = _Search(run, tuple(specs), refusals, tie)
    first, scalar = search.first()
    runs = [first]
    warnings = []
    for symbol in symbols_of(specs):
        other = search.other(first, symbol, scalar)
        if other:
            runs.append(other)
        elif symbol in batch_symbols(specs):
            raise InvalidInputsError(
                f"The dimension {symbol!r} cannot vary: the model runs at {first.sizes[symbol]} only "
                f"({search.said}). Give the number instead of the word."
            )
        else:
            warnings.append(
                f"The dimension {symbol!r} ran at {first.sizes[symbol]} and at no other size that was tried; "
                f"give the number instead of the word if it is fixed."
            )
    everything = search.attempt(tie(_merged(runs), ""), scalar, seed=7)
    return TrialRuns((*runs, everything) if everything else tuple(runs), tuple(warnings))


def _merged(runs: Sequence[TrialRun]) -> dict[str, int]:
    """Every dimension at a size of its own that is not the first run's."""
    sizes = dict(runs[0].sizes)
    for trial in runs[1:]:
        sizes |= {name: size for name, size in trial.sizes.items() if size != runs[0].sizes[name]}
    return sizes


class _Search:
    def __init__(
        self, run: Run, specs: tuple[TensorSpec, ...], refusals: tuple[type[Exception], ...], tie: Tie
    ) -> None:
        self._run, self._specs, self._refusals, self._tie = run, specs, refusals, tie
        # Lengths of sequences are at least 1; what was taken once is tried first.
        has_integers = any(spec.shape != () and "int" in spec.dtype for spec in specs)
        self._least = [0, 1] if has_integers else [0]
        self.said = ""

    def first(self) -> tuple[TrialRun, int | None]:
        """The first size at which the original runs, and the value of its scalars."""
        batches = batch_symbols(self._specs)
        others = [name for name in symbols_of(self._specs) if name not in batches]
        scalars = _SCALARS if any(_is_scalar(spec) for spec in self._specs) else (None,)
        said, deadline = "", time.monotonic() + _SEARCH_S
        tries = itertools.product(_FIRST_BATCHES, _size_choices(len(others)), scalars)
        for batch, extents, scalar in itertools.islice(tries, _TRIES):
            sizes = self._tie(dict.fromkeys(batches, batch) | dict(zip(others, extents, strict=True)), "")
            if self._elements(sizes) > _MAX_ELEMENTS:
                continue
            trial = self.attempt(sizes, scalar)
            if trial:
                return trial, scalar
            said = said or self.said
            if time.monotonic() > deadline:
                break
        listed = ", ".join(map(str, self._specs))
        raise InvalidInputsError(f"The model does not run with {listed}: {said}. Check shapes, types and their order.")

    def other(self, first: TrialRun, symbol: str, scalar: int | None) -> TrialRun | None:
        """A run with another extent of one dimension."""
        here = first.sizes[symbol]
        is_batch = symbol in batch_symbols(self._specs)
        others = (here + 1, here * 2, here + 32, max(1, here // 2), here + 16, here + 8)
        choices = _OTHER_BATCHES if is_batch else others
        taken = {size for name, size in first.sizes.items() if name != symbol}
        for size in sorted(choices, key=lambda extent: extent in taken):
            sizes = self._tie({**first.sizes, symbol: size}, symbol)
            if sizes[symbol] != here and (trial := self.attempt(sizes, scalar, seed=size)):
                return trial
        return None

    def _elements(self, sizes: Mapping[str, int]) -> int:
        return sum(
            math.prod(dim if isinstance(dim, int) else sizes.get(dim or "", 1) for dim in spec.shape)
            for spec in self._specs
            if any(isinstance(dim, str) for dim in spec.shape)
        )

    def attempt(self, sizes: Mapping[str, int], scalar: int | None, seed: int = 0) -> TrialRun | None:
        refusals = []
        for least in self._least:
            feeds = example_feeds(self._specs, sizes, seed=seed, least=least)
            if scalar is not None:
                for spec in self._specs:
                    if _is_scalar(spec):
                        feeds[spec.name][...] = scalar
            try:
                trial = TrialRun(dict(sizes), feeds, self._run(dict(feeds)))
            except self._refusals as error:
                refusals.append(first_line(error))
                continue
            self._least.sort(key=lambda other: other != least)
            return trial
        self.said = refusals[0]
        return None


def _is_scalar(spec: TensorSpec) -> bool:
    return spec.shape == () and "int" in spec.dtype


def _size_choices(count: int) -> Iterator[tuple[int, ...]]:
    """Extents for `count` dimensions: all alike first, then different ones."""
    if count == 0:
        yield ()
        return
    for size in _SIZES:
        yield (size,) * count
    if count > 1:
        yield from (extents for extents in itertools.product(_FEW_SIZES, repeat=count) if len(set(extents)) > 1)


def first_line(error: BaseException) -> str:
    """What torch said, without its traceback of TorchScript and C++ frames: of errors that led to others, the first."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and len(chain) < _LONGEST_CHAIN:
        chain.append(cause)
    if _NO_FUNCTION in str(chain[-1]) and (node := next(filter(None, map(_NODE.search, map(str, chain))), None)):
        complex_numbers = " on complex numbers" if _COMPLEX in str(chain[-1]) else ""
        return f"the exporter has no ONNX for the operator {node['library']}::{node['operator']}{complex_numbers}"
    return _useful_line(chain[-1])


def _useful_line(error: BaseException) -> str:
    said = str(error).partition(_WHERE)[0]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(_NOISE)]
    if unknown := [line for line in useful if line.startswith("Unknown builtin op: ")]:
        return unknown[0].rstrip(".")[:300]
    told = (
        [line for line in useful if "rror:" in line and not line.endswith("rror:")]
        or useful[-1:]
        or [type(error).__name__]
    )
    text = told[-1] if told[-1] in useful else told[0]
    return text.removeprefix("RuntimeError: ").rstrip(".")[:300]
