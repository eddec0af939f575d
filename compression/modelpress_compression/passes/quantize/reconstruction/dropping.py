"""QDrop (Wei et al., arXiv:2203.05740): while weights learn their rounding, activations are quantized at random only.

    x  ->  Choose(x, DequantizeLinear(QuantizeLinear(x)), SHARE)

for every activation of a block, element by element. SHARE 1: all are quantized, as the finished model has it; 0.5: half
of them. What is learned with it lies on flatter ground, and holds on samples that were not seen.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import graph_of, is_op, required
from modelpress_compression.model import Model

SHARE = "modelpress_share_quantized"
_DOMAIN = "modelpress.training"
_LEVELS = 256  # of a random byte


def add_dropping(model: Model) -> str:
    """Puts the choice behind every pair of quantization in the main graph, in place; returns the name of the constant
    that says how many."""
    editor = Editor(model)
    share = editor.constant(model.graph, np.asarray(1.0, np.float32), SHARE)
    for node in list(model.graph):
        quantizer = required(node, 0).producer() if is_op(node, "DequantizeLinear") else None
        if quantizer is None or not is_op(quantizer, "QuantizeLinear"):
            continue
        x, quantized = required(quantizer, 0), node.outputs[0]
        chosen = editor.make("Choose", [x, x, share], "drop", domain=_DOMAIN)
        editor.hand_over(quantized, chosen.outputs[0])
        quantized.name = editor.name("drop_quantized")
        chosen.replace_input_with(1, quantized)
        graph_of(node).insert_after(node, chosen)
    return share.name or SHARE


def at_random(like: Tensor, share: float) -> Tensor:
    """True for about that share of the elements, rounded to 256ths. Random bytes take a fifth of the time of random
    floats, which was a third of learning."""
    if share >= 1:
        return torch.ones((), dtype=torch.bool, device=like.device)
    count = like.numel()
    words = torch.randint(-(2**63), 2**63 - 1, (count // 8 + 1,), device=like.device)
    numbers = words.view(torch.int8)[:count]
    return (numbers < round(share * _LEVELS) - _LEVELS // 2).view(like.shape)


@operator("Choose", domain=_DOMAIN, deterministic=False)
def _choose(site: Site) -> Function:
    """(x, quantized, share): `quantized` for so many elements, x for the others."""
    return lambda x, quantized, share: torch.where(at_random(x, float(share)), quantized, x)
