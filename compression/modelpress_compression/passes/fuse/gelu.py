"""GELU written out in elementary operators becomes one.

    erf form    x/2 * (1 + erf(x / sqrt(2)))
    tanh form   x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))

Hendrycks and Gimpel, "Gaussian Error Linear Units" (arXiv:1606.08415). The product of x, 1/2 and the parenthesis comes
in every order; x^3 as Pow or as products. From opset 20 on the result is ONNX's Gelu; before, com.microsoft's Gelu and
FastGelu, since onnxruntime itself recognizes one order of the erf form only when it loads a model, never the others.

It must not fire when a value between has another consumer or is an output of the graph.
"""

from __future__ import annotations

import math
from typing import ClassVar

import onnx_ir

from modelpress_compression.graph.read import MICROSOFT, constant_scalar, other_operand
from modelpress_compression.passes.fuse.rewriting import FIRED, Outcome, Scope, scalar_beside

GELU_OPSET = 20
_CUBIC = 0.044715


class FuseGelu:
    """Recognizes both forms of GELU by their Erf or Tanh."""

    name: ClassVar[str] = "gelu"
    op_types: ClassVar[frozenset[str]] = frozenset({"Erf", "Tanh"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        value = _erf_argument(node, scope) if node.op_type == "Erf" else _tanh_argument(node, scope)
        if value is None:
            return "Erf stays: its argument is not x / sqrt(2)." if node.op_type == "Erf" else None
        last = _last_product(node, value, scope)
        if last is None:
            return (
                f"GELU at {node.op_type} stays: the product around it has another form, or is used elsewhere as well."
            )
        tanh = node.op_type == "Tanh"
        if scope.opset >= GELU_OPSET:
            made = scope.make_like(last, "Gelu", [value], {"approximate": "tanh" if tanh else "none"})
        else:
            made = scope.make_like(last, "FastGelu" if tanh else "Gelu", [value], domain=MICROSOFT)
        scope.replace(last, [last], [made])
        return FIRED


def _close(value: onnx_ir.Value | None, wanted: float, varying: onnx_ir.Value | None) -> bool:
    """Whether the value is this constant, with no more axes than the operand that varies."""
    number = scalar_beside(value, varying)
    return number is not None and math.isclose(number, wanted, rel_tol=2e-3)


def _times(value: onnx_ir.Value | None, factor: float, scope: Scope) -> onnx_ir.Value | None:
    """y if the value is y * factor or y / (1 / factor)."""
    node = scope.producer(value, "Mul", "Div")
    if node is None:
        return None
    if node.op_type == "Div":
        return node.inputs[0] if _close(node.inputs[1], 1 / factor, node.inputs[0]) else None
    for position in (0, 1):
        if _close(node.inputs[position], factor, node.inputs[1 - position]):
            return node.inputs[1 - position]
    return None


def _erf_argument(node: onnx_ir.Node, scope: Scope) -> onnx_ir.Value | None:
    return _times(node.inputs[0], 1 / math.sqrt(2), scope)


def _tanh_argument(node: onnx_ir.Node, scope: Scope) -> onnx_ir.Value | None:
    """x of tanh(sqrt(2/pi) * (x + 0.044715 x^3)), also as sqrt(2/pi) * x * (1 + 0.044715 x^2)."""
    inner = _times(node.inputs[0], math.sqrt(2 / math.pi), scope)
    total = scope.producer(inner, "Add")
    if total is not None:
        for value, cube in (tuple(total.inputs), tuple(reversed(total.inputs))):
            if value is not None and _is_cubic(cube, value, 3, scope):
                return value
    product = scope.producer(inner, "Mul")
    if product is None:
        return None
    for value, factor in (tuple(product.inputs), tuple(reversed(product.inputs))):
        add = scope.producer(factor, "Add")
        if add is None or value is None:
            continue
        for one, square in (tuple(add.inputs), tuple(reversed(add.inputs))):
            if _close(one, 1.0, square) and _is_cubic(square, value, 2, scope):
                return value
    return None


def _is_cubic(value: onnx_ir.Value | None, base: onnx_ir.Value, exponent: int, scope: Scope) -> bool:
    """Whether the value is 0.044715 base ** exponent, the factors in any order."""
    factors = _factors(value, base, scope, exponent)
    return factors is not None and factors[0] == exponent and math.isclose(factors[1], _CUBIC, rel_tol=2e-3)


def _factors(  # noqa: PLR0911 - a return for each form
    value: onnx_ir.Value | None, base: onnx_ir.Value, scope: Scope, depth: int
) -> tuple[int, float] | None:
    """How often a product, written as Mul, Div and Pow in at most so many layers, holds the base, and its constant;
    None: it holds something else."""
    if value is base:
        return 1, 1.0
    if (number := scalar_beside(value, base)) is not None:
        return 0, number
    power = scope.producer(value, "Pow")
    if power is not None and power.inputs[0] is base:
        exponent = constant_scalar(power.inputs[1]) or 0.0
        # Roots are another function: they are not there for negative numbers.
        return (int(exponent), 1.0) if exponent >= 1 and exponent == int(exponent) else None
    product = scope.producer(value, "Mul", "Div")
    if product is None or not depth:
        return None
    first, second = (_factors(side, base, scope, depth - 1) for side in product.inputs)
    if first is None or second is None:
        return None
    if product.op_type == "Mul":
        return first[0] + second[0], first[1] * second[1]
    return None if second[0] or not second[1] else (first[0], first[1] / second[1])


def _last_product(node: onnx_ir.Node, value: onnx_ir.Value, scope: Scope) -> onnx_ir.Node | None:
    """The node that completes x * 1/2 * (1 + node), whatever the order of the products."""
    plus_one = scope.follower(node, "Add")
    if plus_one is None or not _close(other_operand(plus_one, node.outputs[0]), 1.0, node.outputs[0]):
        return None
    last, missing = plus_one, {"half", "value"}
    while missing:
        product = scope.follower(last, "Mul", "Div")
        brought = frozenset() if product is None else _brought(product, last.outputs[0], value, scope)
        # Each of the two comes once: with x or 1/2 twice it is another function.
        if product is None or not brought or not brought <= missing:
            return None
        last, missing = product, missing - brought
    return last


def _brought(product: onnx_ir.Node, factor: onnx_ir.Value, value: onnx_ir.Value, scope: Scope) -> frozenset[str]:
    """What of "value" (x) and "half" a product multiplies `factor` with; nothing where it is anything else."""
    other = other_operand(product, factor)
    if product.op_type == "Div":
        return frozenset({"half"} if product.inputs[0] is factor and _close(other, 2.0, factor) else ())
    if _close(other, 0.5, factor):
        return frozenset({"half"})
    if other is value:
        return frozenset({"value"})
    return frozenset({"half", "value"} if _times(other, 0.5, scope) is value else ())
