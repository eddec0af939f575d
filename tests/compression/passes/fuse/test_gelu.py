"""GELU in its written-out forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from modelpress_compression.passes.fuse.config import FuseConfig
from onnx import helper

_WEIGHTS = {
    "root2": math.sqrt(2),
    "inverse": 1 / math.sqrt(2),
    "one": 1.0,
    "half": 0.5,
    "two": 2.0,
    "three": 3.0,
    "cubic": 0.044715,
    "uncubic": 1 / 0.044715,
    "rootpi": math.sqrt(2 / math.pi),
}
_PRODUCTS = {
    "(x * s) / 2": [("Mul", ["x", "s"], "p"), ("Mul", ["p", "half"], "y")],
    "x * (s / 2)": [("Mul", ["half", "s"], "p"), ("Mul", ["x", "p"], "y")],
    "(x / 2) * s": [("Mul", ["x", "half"], "p"), ("Mul", ["p", "s"], "y")],
    "(x * s) div 2": [("Mul", ["x", "s"], "p"), ("Div", ["p", "two"], "y")],
}
_ERF = {
    "div": [("Div", ["x", "root2"], "u"), ("Erf", ["u"], "e"), ("Add", ["e", "one"], "s")],
    "mul": [("Mul", ["inverse", "x"], "u"), ("Erf", ["u"], "e"), ("Add", ["one", "e"], "s")],
}
_TANH_END = [("Mul", ["rootpi", "v"], "u"), ("Tanh", ["u"], "e"), ("Add", ["e", "one"], "s")]
_TANH = {
    "pow": [("Pow", ["x", "three"], "q"), ("Mul", ["cubic", "q"], "r"), ("Add", ["x", "r"], "v"), *_TANH_END],
    "products": [
        ("Mul", ["x", "x"], "q2"),
        ("Mul", ["q2", "x"], "q"),
        ("Mul", ["q", "cubic"], "r"),
        ("Add", ["r", "x"], "v"),
        *_TANH_END,
    ],
    "division": [("Pow", ["x", "three"], "q"), ("Div", ["q", "uncubic"], "r"), ("Add", ["x", "r"], "v"), *_TANH_END],
    "constant first": [
        ("Mul", ["cubic", "x"], "q1"),
        ("Mul", ["x", "q1"], "q2"),
        ("Mul", ["x", "q2"], "r"),
        ("Add", ["x", "r"], "v"),
        *_TANH_END,
    ],
    "factored": [
        ("Mul", ["x", "x"], "q"),
        ("Mul", ["q", "cubic"], "r"),
        ("Add", ["one", "r"], "t"),
        ("Mul", ["x", "t"], "v"),
        *_TANH_END,
    ],
}


def _nodes(parts: list[tuple[str, list[str], str]]) -> list[Any]:
    return [helper.make_node(op, inputs, [target], name=f"n_{target}") for op, inputs, target in parts]


@pytest.mark.parametrize(("argument", "product"), list(itertools.product(_ERF, _PRODUCTS)))
@pytest.mark.parametrize(("opset", "wanted"), [(17, "com.microsoft.Gelu"), (20, "Gelu")])
def test_erf_form(build: Any, fuse: Any, ops: Any, argument: str, product: str, opset: int, wanted: str) -> None:
    """ONNX's operator where the opset has it; the import of com.microsoft only where it is used."""
    result = fuse(build(_nodes(_ERF[argument] + _PRODUCTS[product]), _WEIGHTS, shape=("n", 16), opset=opset))
    assert ops(result) == [wanted]
    assert result.changes == {"gelu": 1}
    assert ("com.microsoft" in result.model.ir.opset_imports) == (opset == 17)


@pytest.mark.parametrize(("argument", "product"), list(itertools.product(_TANH, _PRODUCTS)))
@pytest.mark.parametrize(("opset", "wanted"), [(17, "com.microsoft.FastGelu"), (20, "Gelu")])
def test_tanh_form(build: Any, fuse: Any, ops: Any, argument: str, product: str, opset: int, wanted: str) -> None:
    """The approximation stays the approximation."""
    result = fuse(build(_nodes(_TANH[argument] + _PRODUCTS[product]), _WEIGHTS, shape=("n", 16), opset=opset))
    assert ops(result) == [wanted]


def test_other_erf_stays(build: Any, fuse: Any, ops: Any) -> None:
    """erf(2 x) is no GELU."""
    parts = [("Mul", ["x", "two"], "u"), *_ERF["div"][1:], *_PRODUCTS["(x * s) / 2"]]
    result = fuse(build(_nodes(parts), _WEIGHTS, shape=("n", 16)))
    assert "Erf" in ops(result)
    assert [skip.node for skip in result.skipped] == ["n_e"]


def test_roots_are_no_powers(build: Any, fuse: Any, ops: Any) -> None:
    """x^.5 x^2.5 is a cube of positive numbers alone."""
    weights = _WEIGHTS | {"root": 0.5, "rest": 2.5}
    parts = [
        ("Abs", ["x"], "a"),
        ("Pow", ["a", "root"], "f1"),
        ("Pow", ["a", "rest"], "f2"),
        ("Mul", ["f1", "f2"], "f3"),
        ("Mul", ["f3", "cubic"], "f4"),
        ("Add", ["a", "f4"], "v"),
        *_TANH_END,
        ("Mul", ["half", "s"], "p"),
        ("Mul", ["a", "p"], "y"),
    ]
    assert "Tanh" in ops(fuse(build(_nodes(parts), weights, shape=("n", 16))))


@pytest.mark.parametrize("factors", [["x", "x"], ["x", "x", "x", "x"], ["x", "x", "two"], ["x", "x", "y2"]])
def test_other_cubes_stay(build: Any, fuse: Any, ops: Any, factors: list[str]) -> None:
    """x + c x^2, c x^4, 2 c x^2 and c x^2 tanh(x) inside the tanh are no GELU."""
    chain, last = [("Tanh", ["x"], "y2")], "cubic"
    for number, factor in enumerate(factors):
        chain.append(("Mul", [factor, last], f"f{number}"))
        last = f"f{number}"
    parts = [*chain, ("Add", ["x", last], "v"), *_TANH_END, *_PRODUCTS["x * (s / 2)"]]
    assert not {"Gelu", "com.microsoft.FastGelu"} & set(ops(fuse(build(_nodes(parts), _WEIGHTS, shape=("n", 16)))))


def test_intermediate_output_stays(build: Any, fuse: Any, ops: Any) -> None:
    """1 + erf is an output of the graph: it has to be computed."""
    parts = _ERF["div"] + _PRODUCTS["(x * s) / 2"]
    result = fuse(build(_nodes(parts), _WEIGHTS, shape=("n", 16), output=("y", "s")))
    assert "Erf" in ops(result)


def test_switched_off(build: Any, fuse: Any, ops: Any) -> None:
    """`transformers: false` leaves it alone."""
    parts = _ERF["div"] + _PRODUCTS["(x * s) / 2"]
    assert "Erf" in ops(fuse(build(_nodes(parts), _WEIGHTS, shape=("n", 16)), FuseConfig(transformers=False)))
