"""The JSON of a torch.export program: what torch turns into code, held against what exporters write."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from typing import Any

from modelpress_compression.errors import CompressionError
from modelpress_compression.loaders.formats.refusals import refused
from modelpress_compression.loaders.vmapped import VMAP_FUNCTIONS

_NAME = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_.]*)?")
# Weights go by any name that a module or a key of a dict may have; torch puts it between quotes.
_WEIGHT_NAME = re.compile(r"[\w.\- /:+@#()\[\]]{0,1000}")
_WEIGHT_KEYS = frozenset({"fqn", "parameter_name", "buffer_name", "tensor_constant_name"})
_MAX_EXPRESSION = 10_000  # characters

_OPERATOR_NAMESPACES = frozenset(
    {
        "aten",
        "prims",
        "prim",
        "higher_order",
        "quantized",
        "quantized_decomposed",
        "torchvision",
        "onnx",
        "onnx_symbolic",
    }
)
# Of other libraries; see `expert_ops`.
_KNOWN_OPERATORS = frozenset({"transformers.grouped_mm_fallback"})
_DUNDER_OPERATORS = frozenset(
    f"__{prefix}{name}__" for prefix in ("", "i") for name in ("and", "or", "xor", "lshift", "rshift")
)
# Operators that reach files.
_FORBIDDEN_OPERATORS = frozenset({"from_file", "save"})
_PYTHON_OPERATORS = frozenset(
    "_operator." + name
    for name in (
        "getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "eq", "ne", "lt", "le", "gt",
        "ge", "and_", "or_", "not_", "xor", "lshift", "rshift", "abs",
    )
)  # fmt: skip
_SYMBOLIC = re.compile(r"torch\.(?:sym_\w+|_sym_\w+)|math\.[a-z]\w*")

_EXPRESSION_CALLS = frozenset(
    {
        "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "FloorDiv", "PythonMod",
        "ModularIndexing", "Where", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "FloatPow",
        "PowByNatural", "FloatTrueDiv", "IntTrueDiv", "TruncToInt", "TruncToFloat", "RoundToInt", "RoundDecimal",
        "ToFloat", "Identity", "Equality", "Eq", "Unequality", "Ne", "LessThan", "StrictLessThan", "Le", "Lt",
        "GreaterThan", "StrictGreaterThan", "Ge", "Gt", "And", "Or", "Not", "Piecewise", "ExprCondPair", "floor",
        "ceiling", "Abs", "sqrt", "IsNonOverlappingAndDenseIndicator", "BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or",
    }
)  # fmt: skip
# What torch's printer of guards writes beside arithmetic: of tensors, of `math` and of `torch`.
_GUARD_ATTRIBUTES = frozenset(
    {
        "size", "stride", "storage_offset", "shape", "inf", "nan", "isnan", "sqrt", "floor", "ceil", "trunc",
        "sym_float", "_sym_sqrt",
    }
)  # fmt: skip
# Python's own. With a keyword, `max` would call what it is given.
_GUARD_FUNCTIONS = frozenset({"max", "min", "abs", "round"})
_PLAIN = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Load, ast.operator, ast.unaryop, ast.boolop,
    ast.cmpop, ast.keyword, ast.Tuple, ast.IfExp,
)  # fmt: skip


def check_program(document: Any) -> None:
    """Raises RejectedModelError (finding=PROGRAM), UnsupportedOperatorError for operators of unknown libraries."""
    for key, value in _walk(document):
        if isinstance(value, str):
            _check_text(key, value)
        elif key == "guards_code":
            for item in value or ():
                check_expression(str(item), guard=True)
        elif key == "forward_arg_names":
            _check_names(value or ())
        elif key == "range_constraints" and isinstance(value, dict):
            for size in value:
                check_expression(str(size), guard=False)
        elif key.endswith("_values") and isinstance(value, dict):
            _check_names(value)


def _check_text(key: str, value: str) -> None:
    if key in _WEIGHT_KEYS:
        _check_names([value], _WEIGHT_NAME)
    elif key in ("name", "as_name") or key.endswith("_name"):
        _check_names([value])
    elif key in ("target", "as_operator"):
        _check_target(value)
    elif key == "expr_str":
        check_expression(value, guard=False)


def _check_names(names: Iterable[object], allowed: re.Pattern[str] = _NAME) -> None:
    for name in names:
        if not allowed.fullmatch(str(name)):
            raise _reject(f"the name {str(name)[:80]!r}")


def _walk(document: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of every object, but for `metadata`, which torch keeps as text."""
    stack = [document]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                if key == "metadata":
                    continue
                yield key, value
                stack.append(value)
        elif isinstance(item, list):
            stack.extend(item)


def _reject(what: str) -> CompressionError:
    return refused("PROGRAM", found=what)


def _check_target(target: str) -> None:
    parts = target.split(".")
    if target in _PYTHON_OPERATORS or target in VMAP_FUNCTIONS or _SYMBOLIC.fullmatch(target):
        return
    plain = all(part.isidentifier() and (not part.startswith("__") or part in _DUNDER_OPERATORS) for part in parts)
    if not plain or parts[:2] != ["torch", "ops"] or len(parts) not in (4, 5) or parts[3] in _FORBIDDEN_OPERATORS:
        raise _reject(f"a call of {target[:80]!r}")
    if parts[2] not in _OPERATOR_NAMESPACES and ".".join(parts[2:4]) not in _KNOWN_OPERATORS:
        raise refused("FOREIGN_OPERATOR", op_type="::".join(parts[2:4])[:80])


def check_expression(text: str, *, guard: bool) -> None:
    """A symbolic size, or a guard over `L['x'].size()[0]`. Raises RejectedModelError for all but arithmetic."""
    if len(text) > _MAX_EXPRESSION:
        raise _reject("an expression of more than ten thousand characters")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _reject(f"the expression {text[:80]!r}") from error
    for node in ast.walk(tree):
        if not _is_arithmetic(node, guard=guard):
            raise _reject(f"the expression {text[:80]!r}")


def _is_arithmetic(node: ast.AST, *, guard: bool) -> bool:
    if isinstance(node, _PLAIN):
        return True
    if isinstance(node, ast.Constant):
        # A text in a guard is the key of a dict that the model takes.
        text, allowed = node.value, _WEIGHT_NAME if guard else _NAME
        return not isinstance(text, bytes) and (not isinstance(text, str) or allowed.fullmatch(text) is not None)
    if isinstance(node, ast.Name):
        return not node.id.startswith("__")
    if isinstance(node, ast.Call):
        return _is_known_call(node, guard=guard)
    if guard and isinstance(node, ast.Attribute):
        return node.attr in _GUARD_ATTRIBUTES or _is_field(node)
    return guard and isinstance(node, ast.Subscript | ast.List)


def _is_field(node: ast.Attribute) -> bool:
    """Whether it is a field of a named tuple or dataclass among the inputs, such as `L['p'].a`."""
    base: ast.expr = node
    while isinstance(base, ast.Attribute | ast.Subscript):
        if isinstance(base, ast.Attribute) and base.attr.startswith("_"):
            return False
        base = base.value
    return isinstance(base, ast.Name) and base.id == "L"


def _is_known_call(node: ast.Call, *, guard: bool) -> bool:
    function = node.func
    if isinstance(function, ast.Name):
        plain = guard and function.id in _GUARD_FUNCTIONS and not node.keywords
        return plain or function.id in _EXPRESSION_CALLS
    return guard and isinstance(function, ast.Attribute) and function.attr in _GUARD_ATTRIBUTES
