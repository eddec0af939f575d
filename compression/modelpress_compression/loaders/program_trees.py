"""The program that torch is given: as it was written, but for what torch would make Python objects or code of.

A torch.export program says how its tensors are nested in the arguments and results of the model's `forward`: tuples,
lists, dicts, and types that libraries registered, such as the outputs and caches of transformers. Building those needs
the libraries' code. A model in ONNX has no nesting, so the trees are only read here, for the number of their leaves:
torch gets a program that takes a tuple and returns a tuple.

    forward(ids, *, past=DynamicCache)  ->  forward(ids, past_0, past_1, ...)
    SequenceClassifierOutput(logits)    ->  (logits,)

Left out besides: sample inputs, guards (Python source), signatures of inner modules, and arguments and results that are
constants of the program (None, a flag, a string).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from modelpress_compression.errors import RejectedModelError, UnsupportedFormatError

# Arguments that are values of the graph; any other kind is a constant.
_VALUES = frozenset({"as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"})
_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
_LABEL = re.compile(r"[A-Za-z_][\w.\-]{0,99}")


def plain_program(document: Any) -> Any:
    """The program with flat inputs and outputs; `document` itself is left as it is.

    Raises UnsupportedFormatError where it is none, RejectedModelError where its trees do not fit its graph.
    """
    try:
        return _plain(document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise UnsupportedFormatError(
            "The torch.export program is not complete; write it again with torch.export.save."
        ) from error


def _plain(document: dict[str, Any]) -> dict[str, Any]:
    module = document["graph_module"]
    graph, signature = module["graph"], module["signature"]
    call = next(entry["signature"] for entry in module["module_call_graph"] if entry["fqn"] == "")
    _check_leaves("inputs", call["in_spec"], sum(map(_is_users, signature["input_specs"])))
    _check_leaves("outputs", call["out_spec"], sum("user_output" in spec for spec in signature["output_specs"]))
    inputs = [
        (argument, spec)
        for argument, spec in zip(graph["inputs"], signature["input_specs"], strict=True)
        if "constant_input" not in spec
    ]
    outputs = [
        (argument, spec)
        for argument, spec in zip(graph["outputs"], signature["output_specs"], strict=True)
        if "user_output" not in spec or argument.keys() & _VALUES
    ]
    taken = sum("user_input" in spec for _, spec in inputs)
    given = sum("user_output" in spec for _, spec in outputs)
    root = {
        "fqn": "",
        "signature": {
            "inputs": [],
            "outputs": [],
            "in_spec": _tree(_tuple(_tuple(*[_LEAF] * taken), _dict())),
            "out_spec": _tree(_tuple(*[_LEAF] * given)),
            "forward_arg_names": [_name(argument) for argument, spec in inputs if "user_input" in spec],
        },
    }
    single = {"is_single_tensor_return": False}
    plain_module = {
        **module,
        "graph": {**graph, **single, "inputs": [pair[0] for pair in inputs], "outputs": [pair[0] for pair in outputs]},
        "signature": {
            **signature,
            "input_specs": [pair[1] for pair in inputs],
            "output_specs": [pair[1] for pair in outputs],
        },
        "module_call_graph": [root],
        "treespec_namedtuple_fields": {},
    }
    return {**document, "graph_module": plain_module, "guards_code": []}


def output_labels(document: Any) -> tuple[str | None, ...]:
    """What the results are called where their tree says so: keys of dicts, fields of dataclasses and named tuples.

    One for each output of the plain program, in order. `document` is one that `plain_program` took.
    """
    module = document["graph_module"]
    graph, signature = module["graph"], module["signature"]
    call = next(entry["signature"] for entry in module["module_call_graph"] if entry["fqn"] == "")
    labels = _labels(call["out_spec"], module.get("treespec_namedtuple_fields") or {})
    users = [
        argument
        for argument, spec in zip(graph["outputs"], signature["output_specs"], strict=True)
        if "user_output" in spec
    ]
    return tuple(label for label, argument in zip(labels, users, strict=True) if argument.keys() & _VALUES)


def _labels(text: str, named_tuples: dict[str, Any]) -> list[str | None]:
    """`logits`, `past_key_values_0`; None for a leaf that no name leads to, or more than one, or an odd one."""
    _, root = json.loads(text)
    found: list[str | None] = []
    stack: list[tuple[dict[str, Any], tuple[str, ...]]] = [(root, ())]
    while stack:
        node, path = stack.pop()
        if node["type"] is None:
            label = "_".join(path)
            found.append(label if _LABEL.fullmatch(label) else None)
            continue
        children = node["children_spec"]
        names = _child_names(node, named_tuples)
        # Places in a list say nothing by themselves.
        steps = names or [str(index) if path and len(children) > 1 else "" for index in range(len(children))]
        pairs = zip(children, steps, strict=True)
        stack.extend([(child, (*path, step) if step else path) for child, step in pairs][::-1])
    counts = Counter(found)
    return [label if counts[label] == 1 else None for label in found]


def _child_names(node: dict[str, Any], named_tuples: dict[str, Any]) -> list[str]:
    """What a dict, a named tuple or a dataclass calls its children; none of another type, and where they do not fit."""
    count = len(node["children_spec"])
    if node["type"] == "collections.namedtuple":
        names = named_tuples.get(str(node["context"]), {}).get("field_names")
    else:
        names = _json_or_none(node["context"])
        # Of a dataclass: fields that have a value, and those that are None.
        if isinstance(names, list) and names and isinstance(names[0], list):
            names = names[0]
    fits = isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names)
    return list(names) if fits else []


def _json_or_none(text: object) -> Any:
    try:
        return json.loads(str(text))
    except ValueError:
        return None


def _name(argument: dict[str, Any]) -> str:
    """Of a value of the graph: tensors have a `name`, numbers an `as_name`."""
    (value,) = argument.values()
    return str(value.get("name") or value["as_name"])


def _is_users(spec: dict[str, Any]) -> bool:
    return bool(spec.keys() & {"user_input", "constant_input"})


def _check_leaves(what: str, text: str, count: int) -> None:
    described = _leaves(text)
    if described != count:
        raise RejectedModelError(
            f"The torch.export program describes {described} {what}, and its graph has {count}; write it again with "
            f"torch.export.save.",
            finding="PROGRAM",
        )


def _leaves(text: str) -> int:
    """Leaves of a tree as torch.utils._pytree writes it: `[1, {"type", "context", "children_spec"}]`."""
    _, root = json.loads(text)
    count, stack = 0, [root]
    while stack:
        node = stack.pop()
        count += node["type"] is None
        stack.extend(node["children_spec"])
    return count


def _tree(node: dict[str, Any]) -> str:
    return json.dumps([1, node])


def _tuple(*children: dict[str, Any]) -> dict[str, Any]:
    return {"type": "builtins.tuple", "context": "null", "children_spec": list(children)}


def _dict() -> dict[str, Any]:
    return {"type": "builtins.dict", "context": "[]", "children_spec": []}
