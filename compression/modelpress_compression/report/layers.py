"""Size by layer, before and after: the largest layers, and the rest in one row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

MAX_ROWS = 40
# What quantizers and fusions append to the name of a node that they replace.
_SUFFIX = re.compile(
    r"(?:[_/](?:quant(?:ized)?|fused|Q|DQ|\w*Integer|QuantizeLinear|DequantizeLinear|DynamicQuantize\w+|MatMulNBits"
    r"|GatherBlockQuantized|QAttention))+$"
)


class LayerFigures(Protocol):
    """What the report takes from `measure.stats.LayerStats`."""

    @property
    def name(self) -> str: ...
    @property
    def op_type(self) -> str: ...
    @property
    def bytes(self) -> int: ...


def layer_rows(original: Sequence[LayerFigures], optimized: Sequence[LayerFigures]) -> list[dict[str, Any]]:
    """Rows of `layers`, largest first; `original_bytes` or `optimized_bytes` is None where there is no such layer.

    Layers belong together by name, apart from what a rewrite appends to it. Beyond 40 the rest is summed in a last row,
    whose `layers` says how many it stands for.
    """
    before, after = _by_name(original), _by_name(optimized)
    operators = {_key(layer): layer.op_type for layer in (*optimized, *original)}
    names = sorted(before.keys() | after.keys(), key=lambda name: (-max(before[name], after[name]), name))
    rows = [_row(name, operators[name], before.get(name), after.get(name)) for name in names[:MAX_ROWS]]
    rest = names[MAX_ROWS:]
    if rest:
        total = [sum(sizes.get(name, 0) for name in rest) for sizes in (before, after)]
        rows.append(_row("other layers", "", *total) | {"layers": len(rest)})
    return rows


def _row(name: str, op_type: str, original_bytes: int | None, optimized_bytes: int | None) -> dict[str, Any]:
    return {
        "name": name,
        "op_type": op_type,
        "original_bytes": original_bytes,
        "optimized_bytes": optimized_bytes,
        "layers": 1,
    }


def _key(layer: LayerFigures) -> str:
    return _SUFFIX.sub("", layer.name) or layer.name


def _by_name(layers: Sequence[LayerFigures]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for layer in layers:
        sizes[_key(layer)] += layer.bytes
    return sizes
