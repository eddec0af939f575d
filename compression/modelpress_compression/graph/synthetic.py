"""Inputs for a model that came without data: shapes by trying until it runs, values by what the graph does with them.

Extents of dynamic dimensions are looked for in a fixed order, equal names having equal extents: what the first Conv or
matrix product demands; what a name suggests (seq: 32, height: 64); what its place suggests; what failures name. Small
ones come first, since every figure of a job costs many runs. See `values` for the rest.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product

import numpy as np
import onnx_ir

from modelpress_compression.errors import ModelNotRunnableError
from modelpress_compression.graph.read import extent, input_of, int_attribute
from modelpress_compression.graph.shapes import sample_shapes
from modelpress_compression.graph.values import ATTEMPTS, is_certain, plausible_values
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.model import Model
from modelpress_compression.runtime import run, session_of
from modelpress_compression.specs import TensorSpec

DEFAULT_SAMPLES = 32
MAX_BYTES = 256 * 1024**2  # 256 MiB: of larger inputs there are fewer samples
MAX_TRIES = 200
# How many failures, and numbers in each, are read for sizes that the graph insists on.
_READ_PROBLEMS = 3
_READ_NUMBERS = 8
_LISTED_SIZES = 12
TIME_LIMIT_S = 20.0
# A run that takes longer makes every figure slow: smaller extents are looked for, and there are fewer samples.
SLOW_RUN_S = 1.0
MIN_SAMPLES = 4

_SPATIAL = (64, 32, 48, 224, 128, 256, 28, 16, 320, 299, 512, 640, 8, 1)
_TOKENS = (32, 16, 64, 128, 8, 256, 512, 1)
_SIGNAL = (512, 576, 1_024, 256, 4_096, 16_000, 80, 128, 64, 48_000, 1)
_PAST = (16, 1, 0)
_CHANNELS = (3, 1, 4, 64)
_OTHER = (32, 64, 16, 128, 8, 4, 2, 1)
_BATCH = re.compile(r"batch|^n$|^b$|^bs$", re.IGNORECASE)
_WORDS = (
    (re.compile(r"past|cache", re.IGNORECASE), _PAST),
    (re.compile(r"height|width|^h$|^w$|image|size", re.IGNORECASE), _SPATIAL),
    (re.compile(r"chan|^c$", re.IGNORECASE), _CHANNELS),
    (re.compile(r"seq|len|token|^s$|^l$", re.IGNORECASE), _TOKENS),
    (re.compile(r"time|frame|sample|audio|^t$", re.IGNORECASE), _SIGNAL),
)
_SUM = re.compile(r"[\w.]+(?:\s*[+*-]\s*[\w.]+)+")


@dataclass(frozen=True)
class _Plan:
    """Extents to try for each dynamic dimension; a key is its name, or (input, axis) where it has none."""

    candidates: Mapping[str, tuple[int, ...]]
    batched: bool


def synthetic_inputs(model: Model, samples: int = DEFAULT_SAMPLES, seed: int = 0) -> InputData:
    """`samples` samples for every input, on which the model runs; `provided` is False.

    Samples lie along the batch axis; where inputs have none in common, every sample is a feed of its own. There are
    fewer samples where they would take more than 256 MiB, or a run more than a second. Raises ModelNotRunnableError,
    saying what was tried.
    """
    values = {value.name: value for value in model.graph.inputs}
    if not model.inputs:
        raise ModelNotRunnableError("The model takes no inputs, so there is nothing to measure; it is a constant.")
    plan = _plan(model)
    found = _find_extents(model, plan, seed)
    binding, attempt = found.binding, found.attempt
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    shapes = {spec.name: _bind(spec, binding) for spec in model.inputs}
    bytes_each = sum(
        math.prod(shape) * spec.array_dtype.itemsize for spec in model.inputs for shape in [shapes[spec.name]]
    )
    count = max(1, min(samples, MAX_BYTES // max(1, bytes_each)))
    if found.seconds > SLOW_RUN_S:
        count = min(count, max(MIN_SAMPLES, int(samples * SLOW_RUN_S / found.seconds)))
    for spec in model.inputs:
        shape = shapes[spec.name]
        # A fixed batch takes whole batches only.
        rows = -(-count // shape[0]) * shape[0] if plan.batched else count
        shape = (rows, *shape[1:]) if plan.batched else (rows, *shape)
        arrays[spec.name] = plausible_values(values[spec.name], spec, shape, rng, attempt)
    return InputData(model.inputs, arrays, provided=False)


def _plan(model: Model) -> _Plan:
    """What to try for each dimension, and whether samples lie along a batch axis that all inputs have."""
    candidates: dict[str, tuple[int, ...]] = {}
    values = {value.name: value for value in model.graph.inputs}
    for spec in model.inputs:
        for axis, dim in enumerate(spec.shape):
            if not isinstance(dim, int):
                key = _key(spec, axis)
                found = _candidates(spec, axis, values[spec.name])
                # The narrowest knowledge wins: a demand of the graph over a guess from a name.
                if key not in candidates or len(found) < len(candidates[key]):
                    candidates[key] = found
    first = [spec.shape[0] if spec.shape else None for spec in model.inputs]
    fixed = {dim for dim in first if isinstance(dim, int)}
    dynamic = [_key(spec, 0) for spec in model.inputs if spec.shape and not isinstance(spec.shape[0], int)]
    batched = (
        all(spec.shape for spec in model.inputs)
        and all(candidates[key] == (1,) for key in dynamic)
        and (not fixed or (len(fixed) == 1 and (not dynamic or fixed == {1})))
    )
    return _Plan(candidates, batched)


def _key(spec: TensorSpec, axis: int) -> str:
    dim = spec.shape[axis]
    return dim if isinstance(dim, str) and dim not in ("", "?") else f"{spec.name}[{axis}]"


def _candidates(spec: TensorSpec, axis: int, value: onnx_ir.Value) -> tuple[int, ...]:
    name = str(spec.shape[axis] or "")
    rank = len(spec.shape)
    demanded = _demanded(value, axis, rank)
    if demanded is not None:
        return (demanded,)
    known_word = next((extents for words, extents in _WORDS if words.search(name)), None)
    if _BATCH.search(name) or (axis == 0 and known_word is None):
        return (1,)
    usual = _usual(spec, axis)
    if known_word is None:
        return usual
    # Numbers, not tokens: a signal is longer than a sentence.
    likely = _SIGNAL if known_word is _TOKENS and spec.dtype.startswith("float") and rank == 2 else known_word
    # A letter such as c may mean something else than channels.
    return tuple(dict.fromkeys((*likely, *usual)))


def _usual(spec: TensorSpec, axis: int) -> tuple[int, ...]:
    """What an axis in this place may have, whatever its name."""
    rank = len(spec.shape)
    if rank >= 4:
        channel_axis = rank - 1 if spec.shape[-1] in (1, 3, 4) else 1
        return _CHANNELS if axis == channel_axis else _SPATIAL
    return _TOKENS if spec.dtype.startswith("int") else _SIGNAL if rank == 2 else _OTHER


def _demanded(value: onnx_ir.Value, axis: int, rank: int) -> int | None:
    """What the first consumer's weight fixes: Conv its channels, a matrix product its inner extent."""
    for node, position in value.uses():
        if position != 0:
            continue
        weight = input_of(node, 1)
        if node.op_type == "Conv" and axis == 1 and (channels := extent(weight, 1)) is not None:
            return channels * int_attribute(node, "group", 1)
        if node.op_type == "MatMul" and axis == rank - 1 and (rows := extent(weight, -2)) is not None:
            return rows
        if node.op_type == "Gemm" and axis == 1:
            return extent(weight, 1 if int_attribute(node, "transB", 0) else 0)
    return None


def _bindings(plan: _Plan, problems: Sequence[str]) -> Iterator[dict[str, int]]:
    """Extents to try: all candidates in step, numbers that failures name, every combination.

    Names that are sums follow their terms. `problems` grows while the caller tries.
    """
    free = {key: extents for key, extents in plan.candidates.items() if not _SUM.fullmatch(key)}
    sums = plan.candidates.keys() - free.keys()
    seen: set[tuple[int, ...]] = set()
    longest = max((len(extents) for extents in free.values()), default=1)
    in_step = (tuple(extents[min(index, len(extents) - 1)] for extents in free.values()) for index in range(longest))
    # Lazily one after the other: what fails first says what to try next.
    for combination in chain(in_step, _named_by(problems, free), _limited(product(*free.values()))):
        if combination in seen:
            continue
        seen.add(combination)
        binding = dict(zip(free, combination, strict=True))
        yield binding | {key: _sum(key, binding) for key in sums}


def _named_by(problems: Sequence[str], free: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """A size that was baked in while tracing stands in the failure: 'requested shape:{7,4,8}', '7 by 128'."""
    for problem in list(problems)[:_READ_PROBLEMS]:
        numbers = dict.fromkeys(int(digits) for digits in re.findall(r"\b\d{1,5}\b", problem))
        for number in list(numbers)[:_READ_NUMBERS]:
            for alone in (None, *free):
                yield tuple(
                    number if len(extents) > 1 and number > 0 and alone in (None, key) else extents[0]
                    for key, extents in free.items()
                )


def _limited(combinations: Iterator[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    return (combination for _, combination in zip(range(MAX_TRIES), combinations, strict=False))


def _sum(expression: str, binding: Mapping[str, int]) -> int:
    """Value of a dimension such as 'past + seq', left to right; a term that is not known counts as 1."""
    terms = re.split(r"\s*([+*-])\s*", expression)
    total = _term(terms[0], binding)
    for operator, term in zip(terms[1::2], terms[2::2], strict=True):
        value = _term(term, binding)
        total = total + value if operator == "+" else total - value if operator == "-" else total * value
    return max(total, 0)


def _term(term: str, binding: Mapping[str, int]) -> int:
    return int(term) if term.isdigit() else binding.get(term, 1)


def _bind(spec: TensorSpec, binding: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else binding[_key(spec, axis)] for axis, dim in enumerate(spec.shape))


@dataclass(frozen=True)
class _Found:
    """Extents, and attempt at the values, on which the model ran, and how long that took."""

    binding: Mapping[str, int]
    attempt: int
    seconds: float


def _find_extents(model: Model, plan: _Plan, seed: int) -> _Found:
    """The first on which the model runs with finite outputs, or runs at all; of slow ones the fastest."""
    values = {value.name: value for value in model.graph.inputs}
    certain = all(is_certain(values[spec.name], spec) for spec in model.inputs)
    slow: _Found | None = None
    not_finite: _Found | None = None
    tried: list[str] = []
    problems: list[str] = []
    with session_of(model, threads=2) as session:
        deadline = time.monotonic() + TIME_LIMIT_S  # of a large model the session alone may take longer
        attempts = range(1 if certain else ATTEMPTS)
        for binding, attempt in ((binding, attempt) for binding in _bindings(plan, problems) for attempt in attempts):
            if tried and (len(tried) >= MAX_TRIES or time.monotonic() > deadline):
                break
            if slow is not None and not _is_smaller(binding, slow.binding):
                continue
            rng = np.random.default_rng(seed)
            shapes = {spec.name: _bind(spec, binding) for spec in model.inputs}
            tried.append(", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()))
            feeds = {
                spec.name: plausible_values(values[spec.name], spec, shapes[spec.name], rng, attempt)
                for spec in model.inputs
            }
            began = time.monotonic()
            try:
                outputs = run(session, feeds)
            except ModelNotRunnableError as error:
                problems.append(error.message)
                continue
            found = _Found(binding, attempt, time.monotonic() - began)
            if not all(output.dtype.kind != "f" or bool(np.isfinite(output).all()) for output in outputs.values()):
                not_finite = not_finite or found
            elif found.seconds <= SLOW_RUN_S:
                return found
            elif slow is None or found.seconds < slow.seconds:
                slow = found
    if (best := slow or not_finite) is not None:
        return best
    raise ModelNotRunnableError(
        f"The model did not run on any made-up input, {len(tried)} shapes tried, such as {'; '.join(tried[:3])}. "
        f"The first failure: {problems[0] if problems else 'none'} Give inputs that it runs on with --data FILE.npz."
    )


def _is_smaller(binding: Mapping[str, int], than: Mapping[str, int]) -> bool:
    return binding != than and all(size <= than[key] for key, size in binding.items())


def made_up_sizes(data: InputData) -> str:
    """A sentence on the extents that were chosen for dynamic dimensions other than the batch; empty if there are none.

    `data`: of `synthetic_inputs`.
    """
    extents: dict[str, int] = {}
    for name, shape in sample_shapes(data).items():
        spec = next(spec for spec in data.specs if spec.name == name)
        for axis, (dim, size) in enumerate(zip(spec.shape, shape, strict=True)):
            if not isinstance(dim, int) and (axis > 0 or size > 1):
                extents.setdefault(_key(spec, axis), size)
    if not extents:
        return ""
    listed = ", ".join(f"{name} = {size}" for name, size in list(extents.items())[:_LISTED_SIZES])
    more = f" and {len(extents) - _LISTED_SIZES} more" if len(extents) > _LISTED_SIZES else ""
    return (
        f"No data was given. Dynamic dimensions are made up: {listed}{more}. Times and agreement are those at these "
        f"sizes; give --data for the sizes that you use."
    )
