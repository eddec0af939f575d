"""What the factorizations have in common: stages, factors, and what a method must tell of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from modelpress_compression.graph.linear import Matrix
from modelpress_compression.passes.factorize.layers import Layer
from modelpress_compression.passes.factorize.methods.problem import Problem

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """One of the products in the place of a layer. `weight`: [K, O] of a product, [O, C / group, kernel...] of a
    convolution; `axes`: those on which it has the layer's kernel, strides, pads and dilations."""

    weight: Matrix
    axes: tuple[int, ...] = ()
    group: int = 1


@dataclass(frozen=True)
class Factors:
    """`error`: the share of the energy of the answers (of the weight, without data) that is lost."""

    method: str
    ranks: Ranks
    stages: tuple[Stage, ...]
    error: float


class Method(Protocol):
    """One of the factorizations."""

    def why_not(self, layer: Layer) -> str:
        """Why it is none for this layer; "" where it is one."""
        ...

    def cost(self, layer: Layer, ranks: Ranks) -> tuple[int, int]:
        """MACs on one sample, and parameters."""
        ...

    def ranks(self, layer: Layer, share: float, round_to: int) -> Ranks | None:
        """The highest ranks whose factors cost at most this share of the layer; None where none do."""
        ...

    def factors(self, problem: Problem, ranks: Ranks) -> Factors:
        """Of at most these ranks."""
        ...


def rounded(rank: float, round_to: int) -> int:
    """Down to a multiple, where the rank is at least that."""
    whole = int(rank)
    return whole - whole % round_to if whole >= round_to else whole


def fits(method: Method, layer: Layer, ranks: Ranks, share: float) -> bool:
    """Whether the factors cost no more than a share of the layer."""
    macs, parameters = method.cost(layer, ranks)
    return macs <= share * layer.macs and parameters <= share * layer.parameters


def mixing_stage(layer: Layer, mixing: Matrix) -> Stage:
    """The last product of a convolution, 1x1, from [g, F, O]."""
    groups, features, answers = mixing.shape
    return Stage(
        mixing.transpose(0, 2, 1).reshape(groups * answers, features, *(1 for _ in layer.kernel)), group=groups
    )


def all_axes(layer: Layer) -> tuple[int, ...]:
    return tuple(range(len(layer.kernel)))


def why_no_kernel(layer: Layer) -> str:
    if layer.points < 2:
        return "it has no kernel"
    return "its channels are in groups already" if layer.groups > 1 else ""
