"""Complex numbers of a torch.export program as pairs of real ones, for what torch's exporter has no ONNX of.

It knows Fourier transforms, sums and products of complex tensors, and little more. torch itself says of most operators
what they are on real and imaginary parts:

    z * w  ->  (re z re w - im z im w, re z im w + im z re w)      z[a:b]  ->  (re z[a:b], im z[a:b])

A tensor stays complex between two operators that are known on both: it is taken apart and put together again, which
cancels. Fourier transforms get it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

_ATEN = torch.ops.aten
# What takes a tensor apart and puts it together.
_BETWEEN = frozenset({_ATEN.view_as_real, _ATEN.view_as_complex})


def holds_complex(program: torch.export.ExportedProgram) -> bool:
    """Whether a value of the program is complex, its weights included."""
    return any(
        map(_is_complex, pytree.tree_leaves([node.meta.get("val") for node in program.graph_module.graph.nodes]))
    )


def as_pairs(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same computation in operators of the core set, on real and imaginary parts wherever torch knows those."""
    from torch._subclasses.complex_tensor._ops.common import COMPLEX_OPS_TABLE

    for weight in program.state_dict.values():
        weight.requires_grad_(False)  # complex scatters have no gradients, which is no matter here
    program = program.run_decompositions()
    table: Any = torch.export.default_decompositions()  # torch does not type it
    known = dict(table.items())
    for operator, on_parts in _overloads(COMPLEX_OPS_TABLE):
        known[operator] = _on_complex(on_parts, known.get(operator))
    known[_ATEN.full.default] = _full
    program = program.run_decompositions(known)
    _cancel(program.graph_module)
    return program


def _overloads(table: Mapping[Any, Callable[..., Any]]) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Each operator of each packet in the table, with what the packet has."""
    for packet, on_parts in table.items():
        names = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ()  # type: ignore[no-untyped-call]
        yield from ((getattr(packet, name), on_parts) for name in names if packet not in _BETWEEN)


def _is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_complex


def _on_complex(on_parts: Callable[..., Any], otherwise: Callable[..., Any] | None) -> Callable[..., Any]:
    """A decomposition: `on_parts` where an argument is complex, elsewhere what the operator has, if anything."""

    def decomposed(*args: Any, **kwargs: Any) -> Any:
        if not any(map(_is_complex, pytree.tree_leaves((args, kwargs)))):
            return otherwise(*args, **kwargs) if otherwise else NotImplemented
        args, kwargs = pytree.tree_map(_apart, (args, kwargs))
        return pytree.tree_map(_together, on_parts(*args, **kwargs))

    return decomposed


def _apart(value: Any) -> Any:
    from torch._subclasses.complex_tensor import ComplexTensor

    if not _is_complex(value):
        return value
    pairs = torch.view_as_real(value)
    return ComplexTensor(pairs.select(-1, 0), pairs.select(-1, 1))


def _together(value: Any) -> Any:
    from torch._subclasses.complex_tensor import ComplexTensor

    return _joined(value.re, value.im) if isinstance(value, ComplexTensor) else value


def _joined(real: torch.Tensor, imaginary: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(torch.stack((real, imaginary), -1))


def _full(size: Any, value: Any, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """A tensor of one number: no argument says that it is complex, but its type."""
    if dtype is None or not dtype.is_complex:
        return NotImplemented
    parts = (torch.full(size, part, dtype=dtype.to_real(), **kwargs) for part in (value.real, value.imag))
    return _joined(*parts)


def _cancel(module: torch.fx.GraphModule) -> None:
    """A part of a tensor that was just put together is what it was put together from."""
    for node in module.graph.find_nodes(op="call_function", target=_ATEN.select.int):
        pairs, _, place = node.args
        parts = _parts(pairs)
        if parts:
            node.replace_all_uses_with(parts[place])
    module.graph.eliminate_dead_code()
    module.recompile()


def _parts(pairs: Any) -> list[torch.fx.Node]:
    """Real and imaginary part of view_as_real(view_as_complex(stack(re, im))); empty for anything else."""
    found = pairs
    for target in (_ATEN.view_as_real.default, _ATEN.view_as_complex.default, _ATEN.cat.default):
        if not isinstance(found, torch.fx.Node) or found.target is not target:
            return []
        found = found.args[0]
    return [part.args[0] for part in found]
