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
from typing import Any

from modelpress_compression.errors import RejectedModelError, UnsupportedFormatError

# Arguments that are values of the graph; any other kind is a constant.
_VALUES = frozenset({"as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"})
_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


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
