"""LSTM, GRU and RNN: x [time, batch, in] (layout 1: batch first), weights [directions, gates * hidden, in].

Plain LSTMs run in torch's own; everything else (lengths, peepholes, clipping, other activations) step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site

ActivationFunction = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Cell:
    """One direction's arithmetic. `activations`: f, g, h in the order of the ONNX specification."""

    activations: tuple[ActivationFunction, ...]
    clip: float | None
    hidden: int
    input_forget: bool = False
    linear_before_reset: bool = False

    def clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


def _activation(name: str, alpha: float | None, beta: float | None) -> ActivationFunction:
    """An activation by its name in ONNX, case ignored, with that operator's defaults."""

    def or_default(value: float | None, default: float) -> float:
        return default if value is None else value

    table: dict[str, ActivationFunction] = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "softsign": F.softsign,
        "softplus": F.softplus,
        "affine": lambda x: or_default(alpha, 1.0) * x + or_default(beta, 0.0),
        "leakyrelu": lambda x: F.leaky_relu(x, or_default(alpha, 0.01)),
        "thresholdedrelu": lambda x: torch.where(x > or_default(alpha, 1.0), x, torch.zeros_like(x)),
        "scaledtanh": lambda x: or_default(alpha, 1.0) * torch.tanh(or_default(beta, 1.0) * x),
        "hardsigmoid": lambda x: (or_default(alpha, 0.2) * x + or_default(beta, 0.5)).clamp(0, 1),
        "elu": lambda x: F.elu(x, or_default(alpha, 1.0)),
    }
    return table[name.lower()]


def _cells(site: Site, defaults: Sequence[str], directions: int) -> list[_Cell]:
    names = site.strings("activations") or tuple(defaults) * directions
    alphas, betas = list(site.floats("activation_alpha") or ()), list(site.floats("activation_beta") or ())
    functions = [
        _activation(name, alphas[i] if i < len(alphas) else None, betas[i] if i < len(betas) else None)
        for i, name in enumerate(names)
    ]
    clip = site.number("clip", 0.0) if "clip" in site.node.attributes else None
    size = len(defaults)
    return [
        _Cell(
            tuple(functions[size * index : size * (index + 1)]), clip, site.integer("hidden_size", 0),
            site.flag("input_forget"), site.flag("linear_before_reset"),
        )
        for index in range(directions)
    ]  # fmt: skip


def _lstm_step(cell: _Cell, gates: Tensor, recurrent: Tensor, _: Any, state: State, peephole: Tensor | None) -> State:
    """Gates in the order i, o, f, c (Hochreiter and Schmidhuber 1997, with peepholes of Gers et al. 2002)."""
    f, g, h = cell.activations
    hidden, memory = state
    i, o, forget, c = (gates + hidden @ recurrent.t()).chunk(4, -1)
    if peephole is not None:
        p_i, p_o, p_f = peephole.chunk(3, -1)
        i, forget = i + p_i * memory, forget + p_f * memory
    i = f(cell.clipped(i))
    forget = 1 - i if cell.input_forget else f(cell.clipped(forget))
    memory = forget * memory + i * g(cell.clipped(c))
    if peephole is not None:
        o = o + p_o * memory
    return f(cell.clipped(o)) * h(memory), memory


def _gru_step(cell: _Cell, gates: Tensor, recurrent: Tensor, bias: Tensor, state: State, _: Any) -> State:
    """Gates in the order z, r, h (Cho et al. 2014); `bias` is the recurrent one of h."""
    f, g = cell.activations
    (hidden,) = state
    size = cell.hidden
    zr = gates[:, : 2 * size] + hidden @ recurrent[: 2 * size].t()
    z, r = f(cell.clipped(zr)).chunk(2, -1)
    last = recurrent[2 * size :].t()
    inner = r * (hidden @ last + bias) if cell.linear_before_reset else (r * hidden) @ last + bias
    candidate = g(cell.clipped(gates[:, 2 * size :] + inner))
    return ((1 - z) * candidate + z * hidden,)


def _rnn_step(cell: _Cell, gates: Tensor, recurrent: Tensor, _: Any, state: State, __: Any) -> State:
    (f,) = cell.activations
    return (f(cell.clipped(gates + state[0] @ recurrent.t())),)


_STEPS: dict[str, tuple[Callable[..., State], tuple[str, ...], int]] = {
    "LSTM": (_lstm_step, ("Sigmoid", "Tanh", "Tanh"), 4),
    "GRU": (_gru_step, ("Sigmoid", "Tanh"), 3),
    "RNN": (_rnn_step, ("Tanh",), 1),
}


def _input_bias(op_type: str, bias: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """(the bias of the projected input, the bias of the recurrent part of GRU's candidate)."""
    wb, rb = bias.chunk(2)
    if op_type != "GRU":
        return wb + rb, rb
    return torch.cat([wb[: 2 * hidden] + rb[: 2 * hidden], wb[2 * hidden :]]), rb[2 * hidden :]


def _direction(
    op_type: str, cell: _Cell, x: Tensor, weights: tuple[Tensor, Tensor, Tensor | None], state: State,
    peephole: Tensor | None, lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, State]:  # fmt: skip
    """Outputs [time, batch, hidden] and the last state of one direction."""
    step, _, gates = _STEPS[op_type]
    w, r, bias = weights
    added, own = _input_bias(op_type, bias if bias is not None else x.new_zeros(2 * gates * cell.hidden), cell.hidden)
    projected = F.linear(x, w, added)
    outputs: list[Tensor] = [x.new_zeros(0)] * x.shape[0]
    for time in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
        new = step(cell, projected[time], r, own, state, peephole)
        output = new[0]
        if lengths is not None:
            # Beyond its length a sequence keeps its state and puts out zeros.
            alive = (lengths > time)[:, None]
            new = tuple(torch.where(alive, a, b) for a, b in zip(new, state, strict=True))
            output = torch.where(alive, output, torch.zeros_like(output))
        state, outputs[time] = new, output
    return torch.stack(outputs) if outputs else x.new_zeros((0, x.shape[1], cell.hidden)), state


_TORCH_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}


def _native(
    op_type: str, x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None, states: Sequence[Tensor], hidden: int
) -> tuple[Tensor, list[Tensor]]:
    """torch's own LSTM or GRU: gates in its order, as it takes them. Outputs [time, batch, directions * hidden]."""
    directions = w.shape[0]
    order = _TORCH_GATES[op_type]

    def sorted_gates(value: Tensor) -> Tensor:
        parts = value.chunk(len(order))
        return torch.cat([parts[index] for index in order])

    parameters: list[Tensor] = []
    for index in range(directions):
        parameters += [sorted_gates(w[index]), sorted_gates(r[index])]
        if bias is not None:
            parameters += [sorted_gates(half) for half in bias[index].chunk(2)]
    rest = (parameters, bias is not None, 1, 0.0, False, directions == 2, False)
    if op_type == "LSTM":
        y, *last = torch.lstm(x, tuple(states), *rest)
    else:
        y, *last = torch.gru(x, states[0], *rest)
    return y, last


def _is_plain(site: Site, kind: str) -> bool:
    attributes = site.node.attributes
    special = any(name in attributes for name in ("activations", "clip")) or site.flag("input_forget")
    if kind == "GRU" and not site.flag("linear_before_reset"):
        return False
    return kind in _TORCH_GATES and not special and site.string("direction", "forward") != "reverse"


@operator(*_STEPS)
def from_node(site: Site) -> Function:
    return recurrent(site, site.node.op_type)


def recurrent(site: Site, kind: str) -> Function:
    """Outputs Y [time, directions, batch, hidden], Y_h [directions, batch, hidden], and Y_c of LSTM likewise."""
    direction = site.string("direction", "forward")
    directions, batch_first = 2 if direction == "bidirectional" else 1, site.flag("layout")
    cells = _cells(site, _STEPS[kind][1], directions)
    reversed_ = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
    plain = _is_plain(site, kind) and not site.has(4)
    n_states = 2 if kind == "LSTM" else 1

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        given: list[Any] = [*inputs, *([None] * (8 - len(inputs)))]
        x, w, r, bias, lengths, *rest = given
        x = x.transpose(0, 1) if batch_first else x
        hidden = r.shape[-1]
        states = [
            x.new_zeros((directions, x.shape[1], hidden)) if s is None else (s.transpose(0, 1) if batch_first else s)
            for s in rest[:n_states]
        ]
        _check_extents(x, w, r, bias, states, _STEPS[kind][2])
        if plain and rest[2] is None and x.shape[0]:
            y, last = _native(kind, x, w, r, bias, [state.contiguous() for state in states], hidden)
            y = y.reshape(*y.shape[:2], directions, hidden).transpose(1, 2)
        else:
            found = [
                _direction(
                    kind, replace_hidden(cells[i], hidden), x, (w[i], r[i], None if bias is None else bias[i]),
                    tuple(state[i] for state in states), None if rest[2] is None else rest[2][i], lengths, reversed_[i],
                )
                for i in range(directions)
            ]  # fmt: skip
            y = torch.stack([outputs for outputs, _ in found], 1)
            last = [torch.stack([state[number] for _, state in found]) for number in range(n_states)]
        if batch_first:
            y, last = y.permute(2, 0, 1, 3), [state.transpose(0, 1) for state in last]
        return (y, *last)

    return run


def _check_extents(x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None, states: Sequence[Tensor], gates: int) -> None:
    """Raises ValueError where a state or a weight is of another size than the sequence [time, batch, features] has.

    torch's own LSTM checks none of them, and reads and writes beyond the end of what is too small.
    """
    directions, hidden = r.shape[0], r.shape[-1]
    wanted = {
        "W": (w, (directions, gates * hidden, x.shape[-1])),
        "R": (r, (directions, gates * hidden, hidden)),
        **({} if bias is None else {"B": (bias, (directions, 2 * gates * hidden))}),
        **{f"state {number}": (state, (directions, x.shape[1], hidden)) for number, state in enumerate(states)},
    }
    for name, (value, shape) in wanted.items():
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {list(value.shape)} where the sequence needs {list(shape)}")


def replace_hidden(cell: _Cell, hidden: int) -> _Cell:
    """The cell with the size that the weights have: the attribute may be left out."""
    if cell.hidden == hidden:
        return cell
    return _Cell(cell.activations, cell.clip, hidden, cell.input_forget, cell.linear_before_reset)
