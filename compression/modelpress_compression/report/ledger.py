"""What each layer's time went into: before and after, the kernel that ran, and why it is not faster."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from modelpress_compression.decibels import power_share
from modelpress_compression.encodings.operands import is_integer_operator
from modelpress_compression.measure.layer_times import LayerForm, LayerTime, together

SHOWN = 0.01  # of the time of either model: a layer without weights that takes more has a row
_FASTER = 1.2  # times; less is within what such short times vary by
_MATRIX = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"))
_OPERATOR = re.compile(r"^\w+: ")
_EIGHT_BIT_INSTRUCTIONS = re.compile(r"vnni|amx_int8|asimddp|i8mm")


@dataclass(frozen=True)
class Ledger:
    """Times of both models by layer, and what the result's layers are.

    `known`: the original's layers. `left_alone`: why quantization left a layer alone, by layer. `errors`: the share of
    the signal's power at the outputs that a layer loses when it alone is in 8 bits. `instructions`: those of the CPU
    that matter.
    """

    original: Mapping[str, LayerTime]
    optimized: Mapping[str, LayerTime]
    forms: Mapping[str, LayerForm]
    known: Collection[str] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    data_given: bool = False
    instructions: Sequence[str] = ()

    def paired(self, name_of: Callable[[str], str]) -> Ledger:
        """With layers under the names that both models share. `name_of`: from a layer's own name."""
        times = [_merged(times, name_of) for times in (self.original, self.optimized)]
        forms = {name_of(name): form for name, form in reversed(list(self.forms.items()))}
        known = {name_of(name) for name in self.known}
        return replace(self, original=times[0], optimized=times[1], forms=forms, known=known)

    def sums(self, names: Sequence[str]) -> dict[str, float]:
        """The times of these layers together."""
        before, after = (
            sum(times[name].ms for name in names if name in times) for times in (self.original, self.optimized)
        )
        return {"original_ms": before, "optimized_ms": after}

    def long_layers(self) -> set[str]:
        """Those that take over 1 % of the time of either model."""
        found = set()
        for times in (self.original, self.optimized):
            total = sum(time.ms for time in times.values())
            found |= {name for name, time in times.items() if time.ms > SHOWN * total}
        return found

    def op_type(self, name: str) -> str:
        """Of the layer, or of the kernel that onnxruntime has put in."""
        if (form := self.forms.get(name)) is not None:
            return form.op_type
        time = self.optimized.get(name) or self.original.get(name)
        return "" if time is None else time.kernel

    def shares(self) -> dict[str, float]:
        """Of the error of all layers in 8 bits, by layer."""
        mine = {name: error for name, error in self.errors.items() if self._in_integers(name)}
        total = sum(mine.values())
        return {name: error / total for name, error in mine.items()} if total > 0 else {}

    def fields(self, name: str, weighted: bool, share: float | None) -> dict[str, Any]:
        """What a row of the report's `layers` says of the layer's time."""
        before, after = self.original.get(name), self.optimized.get(name)
        return {
            "original_ms": before.ms if before else None,
            "optimized_ms": after.ms if after else None,
            "kernel": after.kernel if after else None,
            "types": after.types if after else None,
            "error_share": share,
            "why": self.why(name, weighted),
        }

    def why(self, name: str, weighted: bool) -> str:
        """One sentence on why the layer is not faster, and what would change that."""
        before, after = self.original.get(name), self.optimized.get(name)
        if after is None:
            if name in self.forms:
                return "It is part of another layer's kernel."
            return "It is no longer there: it was not needed, or is part of another layer."
        if after.inserted:
            return "onnxruntime puts it in where two kernels want their data laid out differently."
        ratio = before.ms / after.ms if before is not None and after.ms > 0 else None
        if before is None and not weighted and name in self.known:
            return "In the original it is part of another layer's kernel; what lies between them now keeps them apart."
        form = self.forms.get(name, LayerForm(after.kernel))
        if is_integer_operator(after.kernel):
            return self._in_eight_bits(form, ratio)
        gain = f"It is {ratio:.1f} times as fast. " if ratio is not None and ratio >= _FASTER else ""
        return gain + self._in_float(name, form, weighted)

    def _in_integers(self, name: str) -> bool:
        time = self.optimized.get(name)
        return time is not None and is_integer_operator(time.kernel)

    def _in_eight_bits(self, form: LayerForm, ratio: float | None) -> str:
        if ratio is None:
            return "It computes in 8 bits; the original has no such layer to compare it with."
        if ratio >= _FASTER:
            return f"It computes in 8 bits, {ratio:.1f} times as fast."
        if ratio >= 1.0:
            return "It computes in 8 bits and takes about as long as before."
        kind = "this depthwise convolution" if form.depthwise else "it"
        cause = "" if any(map(_EIGHT_BIT_INSTRUCTIONS.search, self.instructions)) else ", without VNNI on this CPU"
        return (
            f"In 8 bits {kind} runs {ratio:.2g} times as fast as before{cause}; `exclude` in the recipe leaves it in "
            f"float32."
        )

    def _in_float(self, name: str, form: LayerForm, weighted: bool) -> str:
        if not weighted:
            return f"{form.op_type} has no weights: fewer channels make it faster (prune), fewer bits do not."
        if (reason := self.left_alone.get(name)) is not None:
            return f"It computes in float32: {reason}."
        if form.stored_bits is not None:
            more = (
                "computing in 8 bits takes `quantize: {scheme: static}`, or dynamic"
                if self.data_given
                else "give --data, so that it can compute in 8 bits"
            )
            return f"Its weights are stored in {form.stored_bits} bits and it computes in float32: {more}."
        if form.op_type in _MATRIX:
            return "It computes in float32, since no step of this result quantizes it: quantize, or prune its channels."
        return f"It computes in float32: {form.op_type} is not quantized here; fewer channels make it faster (prune)."


def _merged(times: Mapping[str, LayerTime], name_of: Callable[[str], str]) -> dict[str, LayerTime]:
    parts: defaultdict[str, list[LayerTime]] = defaultdict(list)
    for name, time in times.items():
        parts[name_of(name)].append(time)
    return {name: together(same) for name, same in parts.items()}


def left_alone(skipped: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Why layers are not quantized, by layer, from the nodes that quantization skipped and its reasons."""
    return {node: _OPERATOR.sub("", reason).rstrip(".") for node, reason in skipped}


def errors(details: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The share of the signal's power that each layer loses, from the steps' rows of `error_db`."""
    return {str(row["layer"]): power_share(float(row["error_db"])) for row in details if "error_db" in row}
