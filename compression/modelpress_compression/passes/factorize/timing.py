"""What layers and their factors take on this machine, and which factors are therefore worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from modelpress_compression.measure.latency import Speedup, compare_latency
from modelpress_compression.measure.product_times import Attributes, Chain, Product, ProductTimes
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.factorize.choice import Option
from modelpress_compression.passes.factorize.layers import Layer
from modelpress_compression.passes.factorize.writer import attributes_of

# Factors must be faster by this share: a gain below it is lost in what else a layer's surroundings change.
LEAST_GAIN = 0.05
_ROUNDS, _BUDGET_S = 30, 3.0
_TABLE = "Looking up rows multiplies nothing, and its factors do: they are not faster."
_UNKNOWN = "The shape of its input is not known, so that its time cannot be measured."


class Timer:
    """Measures layers and factors; what was measured once is kept. `full`: milliseconds of layers, by name."""

    def __init__(self, context: Context) -> None:
        self._context, self._times = context, ProductTimes()
        self.full: dict[str, float] = {}

    def timed(self, layer: Layer, options: Sequence[Option]) -> list[Option] | str:
        """The options that are faster than the layer, with their times; or why there are none."""
        if layer.is_table:
            return _TABLE
        if layer.shape is None or min(layer.shape, default=0) < 1:
            return _UNKNOWN
        own = Chain(layer.shape, (_of_layer(layer),))
        chains = [Chain(layer.shape, _of_factors(layer, option)) for option in options]
        with self._context.alone():
            plain, *found = self._times.of([own, *chains])
        times = len(layer.nodes)
        self.full[layer.name] = times * plain
        timed = [replace(option, ms=times * ms) for option, ms in zip(options, found, strict=True)]
        faster = [option for option, ms in zip(timed, found, strict=True) if ms <= (1 - LEAST_GAIN) * plain]
        if not faster:
            return f"Its factors are not faster on this machine: {min(found):.3g} ms, and {plain:.3g} ms the layer."
        return faster


def speedup_of(model: Model, factorized: Model, context: Context) -> Speedup:
    """How many times as fast the factorized model is, measured in turn."""
    with TemporaryDirectory(prefix="factorize-", dir=context.work_directory) as folder:
        before, after = (Path(folder) / name / "model.onnx" for name in ("whole", "factors"))
        for one, path in ((model, before), (factorized, after)):
            path.parent.mkdir()
            one.save(path)
        with context.alone():
            row = compare_latency(
                before, after, context.data, threads=1, batch_size=1, rounds=_ROUNDS, budget_s=_BUDGET_S
            )
    return row.speedup


def _of_layer(layer: Layer) -> Product:
    node = layer.nodes[0]
    weight = layer.weight.shape
    extents = tuple(int(extent) for extent in weight.numpy()) if weight is not None else layer.matrix.shape[1:]
    return Product(node.op_type, extents, _plain({name: item.value for name, item in node.attributes.items()}))


def _of_factors(layer: Layer, option: Option) -> tuple[Product, ...]:
    node = layer.nodes[0]
    return tuple(
        Product(node.op_type, stage.weight.shape, _plain(attributes_of(layer, node, stage))) for stage in option.stages
    )


def _plain(attributes: dict[str, object]) -> Attributes:
    """Those that a hashable key can hold."""
    found: list[tuple[str, int | str | tuple[int, ...]]] = []
    for name, value in sorted(attributes.items()):
        if isinstance(value, int | str):
            found.append((name, value))
        elif isinstance(value, list | tuple):
            found.append((name, tuple(int(item) for item in value)))
    return tuple(found)
