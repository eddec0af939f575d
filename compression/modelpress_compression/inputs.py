"""Representative and evaluation inputs: read from .npz without holding them in memory, checked against the model.

An array holds one sample per entry of its first axis. Where it has as many axes as the model's input, samples are
slices of the batch axis; where it has one axis more, every entry is a whole feed (for models without a batch axis, or
with a state that travels beside it).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from modelpress_compression.archive import Archive, Member
from modelpress_compression.counted import counted
from modelpress_compression.errors import CompressionError, InvalidDataError
from modelpress_compression.picked import picked
from modelpress_compression.specs import DTYPES, TensorSpec

Array = NDArray[np.generic]
Feeds = dict[str, Array]

# An .npz may be deflated; more than this is a bomb or a mistake.
MAX_UNPACKED_BYTES = 64 * 1024**3  # 64 GiB
MAX_RATIO = 200  # unpacked over packed, of the whole file
_RATIO_FLOOR_BYTES = 256 * 1024**2  # 256 MiB; small files may hold as many zeros as they like
LABELS = "labels"
SETTINGS = ("labels_blank", "labels_space")  # classes that mean something to metrics of texts
_CHECK_CHUNK_BYTES = 16 * 1024**2  # 16 MiB


def values_bytes(values: Mapping[str, Array]) -> int:
    """How much memory these arrays take."""
    return sum(array.nbytes for array in values.values())


@dataclass(frozen=True)
class InputData:
    """Samples for every input of a model.

    `arrays[name]`: first axis = samples, already of the model's element type or cast on the way out.
    `provided`: given by the user; False: synthetic.
    `made`: how synthetic ones were made, in words, where they are worth fitting to as real ones are; else empty.
    `labels[i]` belongs to sample i, where the user gave some: a class index, or an array of the output's sample shape.
    """

    specs: tuple[TensorSpec, ...]
    arrays: Mapping[str, Array]
    provided: bool = True
    labels: Array | None = None
    made: str = ""

    def __len__(self) -> int:
        """How many samples there are."""
        return min((len(array) for array in self.arrays.values()), default=0)

    @cached_property
    def varied(self) -> bool:
        """Whether the samples tell anything: False where all are the same, or hold one number throughout."""
        return any(_varies(array) for array in self.arrays.values())

    @property
    def vouches(self) -> bool:
        """Whether ranges and answers seen on these samples say something of real ones."""
        return self.provided and self.varied

    @property
    def can_be_fitted(self) -> bool:
        """Whether what is fitted to these samples holds on real ones too: scales, roundings, corrected biases."""
        return self.provided or bool(self.made)

    @cached_property
    def oddities(self) -> tuple[str, ...]:
        """Sentences on samples that say little of others, and on arrays of another kind than the model takes."""
        found = [text for spec in self.specs if (text := _integers_for_floats(spec, self.arrays[spec.name]))]
        if self.provided and not self.varied:
            found.append("all samples are the same: ranges and agreement measured on them say nothing about others.")
        elif self.provided and len(self) <= self.feed_size:
            found.append(
                "there is one sample alone: ranges and agreement measured on it say next to nothing about others. "
                "Give some dozens that differ as real inputs do."
            )
        left = len(self) % self.feed_size
        if self.provided and left and self.feed_count:
            found.append(
                f"the model takes {self.feed_size:,} samples at a time, so that it is run without the last {left:,} of "
                f"{len(self):,}."
            )
        return tuple(found)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that makes these samples what they are, in hex."""
        total = hashlib.sha256(repr((self.specs, self.provided, self.made)).encode())
        labels = {} if self.labels is None else {LABELS: self.labels}
        for name, array in sorted({**self.arrays, **labels}.items()):
            _hash_into(total, name, array)
        return total.hexdigest()

    @property
    def whole_feeds(self) -> bool:
        """Whether every sample is a feed of its own, so that samples cannot be put together into batches."""
        return any(self.arrays[spec.name].ndim == len(spec.shape) + 1 for spec in self.specs)

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the model insists on, if it does."""
        sizes = {spec.shape[0] for spec in self.specs if spec.shape and isinstance(spec.shape[0], int)}
        fixed = [size for size in sizes if isinstance(size, int)]
        return fixed[0] if len(fixed) == 1 and not self.whole_feeds else None

    @property
    def feed_size(self) -> int:
        """How many samples the smallest feed has: one, or the model's fixed batch."""
        return self.fixed_batch or 1

    @property
    def feed_count(self) -> int:
        """How many of these there are: of `feeds(1)`."""
        return len(self) // self.feed_size

    def feeds(self, batch_size: int = 1, limit: int | None = None) -> Iterator[Feeds]:
        """Feeds of `batch_size` samples (or the model's own fixed batch), at most `limit` samples, in order.

        A last batch that the model's fixed batch size does not permit is left out.
        """
        count = len(self) if limit is None else min(limit, len(self))
        if self.whole_feeds:
            for index in range(count):
                yield {spec.name: self._take(spec, slice(index, index + 1)) for spec in self.specs}
            return
        size = self.fixed_batch or batch_size
        for start in range(0, count, size):
            stop = min(start + size, len(self) if self.fixed_batch else count)
            if self.fixed_batch and stop - start < size:
                return
            yield {spec.name: self._take(spec, slice(start, stop)) for spec in self.specs}

    def head(self, samples: int) -> InputData:
        """The first `samples` samples; nothing is copied."""
        return self._sliced(slice(samples))

    def spread(self, limit: int) -> InputData:
        """`limit` samples, or all where there are fewer; evenly spread, since files are often sorted by class.

        Where the model insists on larger batches, as many as fill one. Nothing is copied.
        """
        count = max(limit, self.feed_size)
        if len(self) <= count:
            return self
        step, rest = divmod(len(self), count)
        return self._sliced(np.arange(count) * len(self) // count if rest else slice(None, None, step))

    def take(self, indices: Sequence[int]) -> Feeds:
        """One feed of these samples, copied. Of whole feeds, or where the batch is fixed, as many as make one feed."""
        if self.whole_feeds:
            (index,) = indices
            return {spec.name: self._take(spec, slice(index, index + 1)) for spec in self.specs}
        rows = np.asarray(indices, np.int64)
        return {
            spec.name: np.ascontiguousarray(self.arrays[spec.name][rows], dtype=spec.array_dtype) for spec in self.specs
        }

    def only(self, feeds: Sequence[int]) -> InputData:
        """The samples of these feeds of `feeds(1)`; nothing is copied."""
        size = self.feed_size
        rows = [row for feed in feeds for row in range(feed * size, (feed + 1) * size)]
        return self._sliced(np.asarray(rows, np.int64))

    def _sliced(self, samples: slice | NDArray[np.int64]) -> InputData:
        arrays = {name: picked(array, samples) for name, array in self.arrays.items()}
        return replace(self, arrays=arrays, labels=None if self.labels is None else self.labels[samples])

    def _take(self, spec: TensorSpec, samples: slice) -> Array:
        array = self.arrays[spec.name]
        taken = array[samples.start] if array.ndim == len(spec.shape) + 1 else array[samples]
        return np.asarray(taken, dtype=spec.array_dtype, order="C")

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Array], specs: tuple[TensorSpec, ...], where: str = "The data"
    ) -> InputData:
        """Checks names, ranks, fixed dimensions, types, counts and values; `labels` may stand beside the inputs.

        Raises InvalidDataError.
        """
        given = {name: np.asanyarray(array) for name, array in arrays.items()}
        labels = None if LABELS in {spec.name for spec in specs} else given.pop(LABELS, None)
        arrays = _match_names(given, specs, where)
        for spec in specs:
            _check_array(spec, arrays[spec.name], where)
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) > 1:
            raise InvalidDataError(f"{where}: the arrays hold different numbers of samples: {counts}.")
        if 0 in counts.values():
            raise InvalidDataError(f"{where} holds no samples.")
        if labels is not None:
            _check_labels(labels, min(counts.values()), where)
        data = cls(specs, arrays, labels=labels)
        if data.fixed_batch and len(data) < data.fixed_batch:
            raise InvalidDataError(
                f"{where} holds {counted(len(data), 'sample')}, but the model takes {data.fixed_batch} at a time."
            )
        return data

    @classmethod
    def read(cls, path: str | os.PathLike[str], specs: tuple[TensorSpec, ...], work_directory: Path) -> InputData:
        """Reads an .npz; its arrays are unpacked into `work_directory` and memory-mapped. Raises InvalidDataError."""
        return cls.from_arrays(_unpack(Path(path), work_directory), specs, where="The data file")


@dataclass(frozen=True)
class EvaluationData:
    """Inputs with labels. `labels[i]` belongs to sample i: a class index, an array of the output's sample shape, or
    what else a metric takes.

    `settings`: what a metric has to know beside labels, by the names in SETTINGS.
    """

    inputs: InputData
    labels: Array
    settings: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """As that of `InputData`, with the labels."""
        total = hashlib.sha256(self.inputs.digest.encode())
        _hash_into(total, LABELS, self.labels)
        if self.settings:
            total.update(repr(sorted(self.settings.items())).encode())
        return total.hexdigest()

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Array], specs: tuple[TensorSpec, ...], where: str = "The evaluation data"
    ) -> EvaluationData:
        """As InputData.from_arrays, and `labels` with as many entries; `SETTINGS` may stand beside them. Raises
        InvalidDataError."""
        if LABELS not in arrays:
            raise InvalidDataError(f"{where} holds no array 'labels'; it has {', '.join(sorted(arrays)) or 'nothing'}.")
        labels = np.asanyarray(arrays[LABELS])
        names = {LABELS, *SETTINGS} - {spec.name for spec in specs if spec.name != LABELS}
        inputs = InputData.from_arrays({name: arrays[name] for name in arrays if name not in names}, specs, where)
        _check_labels(labels, len(inputs), where)
        settings = {name: _setting(name, arrays[name], where) for name in SETTINGS if name in names & arrays.keys()}
        return cls(inputs, labels, settings)

    @classmethod
    def read(cls, path: str | os.PathLike[str], specs: tuple[TensorSpec, ...], work_directory: Path) -> EvaluationData:
        """Reads an .npz with inputs and `labels`. Raises InvalidDataError."""
        return cls.from_arrays(_unpack(Path(path), work_directory), specs, where="The evaluation file")


def specs_of(path: str | os.PathLike[str], work_directory: Path) -> tuple[TensorSpec, ...]:
    """The inputs that an .npz of samples is for, if its arrays are all that a model takes: as many samples as there are
    in each, the other dimensions as they are. Raises InvalidDataError."""
    arrays = _unpack(Path(path), work_directory)
    if LABELS in arrays:
        arrays = {name: array for name, array in arrays.items() if name not in (LABELS, *SETTINGS)}
    return tuple(
        TensorSpec(name, array.dtype.name, ("batch", *array.shape[1:]))
        for name, array in arrays.items()
        if array.ndim and array.dtype.name in DTYPES
    )


def _setting(name: str, array: Array, where: str) -> int:
    number = np.asanyarray(array)
    if number.size != 1 or number.dtype.kind not in "iu":
        raise InvalidDataError(f"{where}: {name!r} must be one whole number, not {number.dtype} {list(number.shape)}.")
    return int(number.reshape(()))


def _check_labels(labels: Array, samples: int, where: str) -> None:
    if labels.dtype.kind not in "biuf":
        raise InvalidDataError(f"{where}: 'labels' must be numbers, not {labels.dtype}.")
    if labels.ndim == 0 or len(labels) != samples:
        raise InvalidDataError(f"{where}: {counted(samples, 'sample')}, but labels of shape {labels.shape}.")


def _match_names(arrays: dict[str, Array], specs: tuple[TensorSpec, ...], where: str) -> dict[str, Array]:
    """Arrays under the inputs' names. One array for one input fits whatever its name is: exporters rename inputs."""
    wanted = [spec.name for spec in specs]
    if len(wanted) == 1 and len(arrays) == 1:
        return {wanted[0]: next(iter(arrays.values()))}
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise InvalidDataError(
            f"{where} has no array for {', '.join(map(repr, missing))}; it has "
            f"{', '.join(sorted(arrays)) or 'nothing'}, the model's inputs are {', '.join(map(str, specs))}."
        )
    return {name: arrays[name] for name in wanted}


def _check_array(spec: TensorSpec, array: Array, where: str) -> None:
    rank = len(spec.shape)
    if array.ndim not in (rank, rank + 1) or array.ndim == 0:
        raise InvalidDataError(
            f"{where}: array {spec.name!r} has shape {array.shape}, which does not fit the input {spec}; its first "
            f"axis must count the samples."
        )
    got = array.shape[array.ndim - rank :]
    # Without an axis of its own the samples lie along the batch axis, whatever its extent.
    first = 1 if array.ndim == rank else 0
    for dim, extent in list(zip(spec.shape, got, strict=True))[first:]:
        if isinstance(dim, int) and dim != extent:
            raise InvalidDataError(
                f"{where}: array {spec.name!r} has shape {array.shape}, which does not fit the input {spec}."
            )
    # NumPy would write any number as a word.
    words = spec.array_dtype.kind == "U"
    if words != (array.dtype.kind == "U") or not (words or np.can_cast(array.dtype, spec.array_dtype, "same_kind")):
        raise InvalidDataError(f"{where}: array {spec.name!r} is {array.dtype}, the input {spec} cannot take that.")
    if array.dtype.kind == "f" and not _all_finite(array):
        raise InvalidDataError(f"{where}: array {spec.name!r} holds NaN or infinite values. Leave these samples out.")


def _integers_for_floats(spec: TensorSpec, array: Array) -> str:
    """What to know of integers that become the floats of an input as they are; empty where they are 0 and 1, or none
    are."""
    if array.dtype.kind not in "iu" or spec.array_dtype.kind != "f":
        return ""
    low, high = _extremes(array)
    if low >= 0 and high <= 1:
        return ""
    return (
        f"array {spec.name!r} holds {array.dtype} from {low} to {high}; the model takes {spec.dtype}, and gets these "
        f"numbers as they are. If it was trained on scaled ones (pixels of 0 to 1, say), scale them in the same way."
    )


def _extremes(array: Array) -> tuple[int, int]:
    """Smallest and largest integer, piece by piece as in `_all_finite`."""
    pieces = [array[rows] for rows in in_pieces(array)]
    return min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)


def _varies(array: Array) -> bool:
    """Whether samples differ, or a single one holds different numbers; stops at the first difference."""
    if len(array) == 1:
        numbers = np.asarray(array).reshape(-1)
        return numbers.size > 1 and bool((numbers != numbers[0]).any())
    return any(not np.array_equal(array[0], sample) for sample in array)


def _all_finite(array: Array) -> bool:
    """Checked piece by piece, since the array may be a file larger than memory."""
    return all(bool(np.isfinite(array[rows]).all()) for rows in in_pieces(array))


def _hash_into(total: hashlib._Hash, name: str, array: Array) -> None:
    """Name, type, shape and values, piece by piece as in `_all_finite`."""
    total.update(repr((name, array.dtype.str, array.shape)).encode())
    for rows in in_pieces(array):
        total.update(np.ascontiguousarray(array[rows]).tobytes())


def in_pieces(array: Array) -> Iterator[slice]:
    """Of the first axis, each of about `_CHECK_CHUNK_BYTES`."""
    rows = max(1, _CHECK_CHUNK_BYTES // max(1, array[:1].nbytes))
    return (slice(start, start + rows) for start in range(0, len(array), rows))


def _unpack(path: Path, work_directory: Path) -> dict[str, Array]:
    """Arrays of an .npz, each unpacked to a file and memory-mapped."""
    try:
        with Archive.open(path, "The data file", writers="numpy.savez") as archive:
            members = [member for member in archive.members if member.name.endswith(".npy")]
            _check_sizes(members, path.stat().st_size)
            arrays = {}
            for number, member in enumerate(members):
                target = work_directory / f"{path.stem}-{number}.npy"
                with target.open("wb") as sink:
                    for piece in archive.pieces(member):
                        sink.write(piece)
                arrays[member.name.removesuffix(".npy")] = _map(target, member.name)
            return arrays
    except InvalidDataError:
        raise
    except CompressionError as error:
        raise InvalidDataError(error.message) from error


def _check_sizes(members: list[Member], file_bytes: int) -> None:
    if not members:
        raise InvalidDataError("The data file holds no arrays; write it with numpy.savez(FILE, NAME=ARRAY, ...).")
    total_bytes = sum(member.size_bytes for member in members)
    if total_bytes > MAX_UNPACKED_BYTES:
        raise InvalidDataError(f"The data file unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB.")
    if total_bytes > max(_RATIO_FLOOR_BYTES, MAX_RATIO * file_bytes):
        raise InvalidDataError(
            f"The data file has {file_bytes} bytes and unpacks to {total_bytes}, more than {MAX_RATIO} times as many; "
            f"such data says nothing. Write fewer samples, or write them with numpy.savez."
        )


def _map(path: Path, name: str) -> Array:
    """An array file in memory; nothing in it is executed, and its header cannot claim more than the file has."""
    try:
        array: Array = npy_format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # the header is a Python literal of any kind: numpy raises whatever its parsers do
        raise InvalidDataError(
            f"The data file: {name[:80]!r} is no readable array of numbers ({' '.join(str(error).split())[:200]}); "
            f"write plain numbers, in one shape for all samples, with numpy.savez."
        ) from error
    return array
