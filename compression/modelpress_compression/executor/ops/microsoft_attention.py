"""Attention of onnxruntime (domain com.microsoft): MultiHeadAttention, and Attention with packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelpress_compression.executor.ops.attention import attend, causal_bias, merge_heads, split_heads
from modelpress_compression.executor.ops.integer import centred
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site
from modelpress_compression.graph.read import MICROSOFT


def _padding_bias(mask: Tensor, keys: int, fill: float, like: Tensor) -> Tensor:
    """Masks of 1 (seen) and 0: [batch, keys], [batch, queries, keys]; or lengths [batch]."""
    if mask.dim() == 1:
        seen = torch.arange(keys, device=mask.device) < mask[: like.shape[0]].reshape(-1, 1)
    else:
        seen = mask.bool()
    seen = seen[:, None, None, :] if seen.dim() == 2 else seen[:, None]
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, fill)


def _added(biases: list[Tensor]) -> Tensor | None:
    return sum(biases[1:], biases[0]) if biases else None


def _scale(site: Site) -> float | None:
    """0 stands for the usual 1 / sqrt(size)."""
    return site.number("scale", 0.0) or None


@operator("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(site: Site) -> Function:
    """q [batch, tokens, heads * size] (or with k and v packed: [batch, tokens, heads, 3, size]); k and v likewise, or
    by heads: [batch, heads, tokens, size]. Outputs y, present key, present value."""
    heads, scale, fill = site.integer("num_heads", 1), _scale(site), site.number("mask_filter_value", -10000.0)
    causal, outputs = site.flag("unidirectional"), site.outputs

    def run(*inputs: Any) -> Any:
        query, key, value, bias, mask, added, past_k, past_v = (*inputs, *([None] * 8))[:8]
        q, k, v = _projections(query, key, value, bias, heads)
        k = k if past_k is None else torch.cat([past_k, k], 2)
        v = v if past_v is None else torch.cat([past_v, v], 2)
        biases = [] if added is None else [added]
        if mask is not None:
            biases.append(_padding_bias(mask, k.shape[2], fill, q))
        if causal:
            biases.append(causal_bias(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], q))
        y, _ = attend(q, k, v, _added(biases), scale)
        return (merge_heads(y), k, v) if outputs > 1 else merge_heads(y)

    return run


def _projections(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v by heads, their bias added."""
    if key is None:
        q, k, v = (part.transpose(1, 2) for part in query.unbind(3))
    elif value is None:
        q = split_heads(query, heads)
        k, v = (part.transpose(1, 2) for part in key.unbind(3))
    else:
        q = split_heads(query, heads)
        k, v = (x if x.dim() == 4 else split_heads(x, heads) for x in (key, value))
    if bias is None:
        return q, k, v
    sizes = [heads * q.shape[-1], heads * k.shape[-1], heads * v.shape[-1]]
    parts = [part.reshape(1, heads, 1, -1) for part in torch.split(bias, sizes)]
    # Keys and values that come by heads were projected elsewhere, with their bias.
    ready = key is not None and key.dim() == 4
    return q + parts[0], k if ready else k + parts[1], v if ready else v + parts[2]


def _packed(site: Site) -> Function:
    """(projected [batch, tokens, 3 * hidden], mask, past, added) -> outputs of Attention."""
    heads, scale, fill = site.integer("num_heads", 1), _scale(site), site.number("mask_filter_value", -10000.0)
    causal, outputs, sizes = site.flag("unidirectional"), site.outputs, site.ints("qkv_hidden_sizes")

    def run(projected: Tensor, mask: Tensor | None, past: Tensor | None, added: Tensor | None) -> Any:
        widths = list(sizes) if sizes else [projected.shape[-1] // 3] * 3
        q, k, v = (split_heads(part, heads) for part in torch.split(projected, widths, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        biases = [] if added is None else [added]
        if mask is not None:
            biases.append(_padding_bias(mask, k.shape[2], fill, q))
        if causal:
            biases.append(causal_bias(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], q))
        y, _ = attend(q, k, v, _added(biases), scale)
        return (merge_heads(y), torch.stack([k, v])) if outputs > 1 else merge_heads(y)

    return run


@operator("Attention", domain=MICROSOFT)
def packed_attention(site: Site) -> Function:
    """x [batch, tokens, in], weights [in, 3 * hidden]."""
    rest = _packed(site)

    def run(*inputs: Any) -> Any:
        x, weights, bias, mask, past, added = (*inputs, *([None] * 6))[:6]
        projected = x @ weights
        return rest(projected if bias is None else projected + bias, mask, past, added)

    return run


@operator("QAttention", domain=MICROSOFT)
def quantized_attention(site: Site) -> Function:
    """Attention whose projection is a product of integers."""
    rest = _packed(site)

    def run(*inputs: Any) -> Any:
        x, weights, bias, x_scale, w_scale, mask, x_zero, w_zero, past = (*inputs, *([None] * 9))[:9]
        product = centred(x, x_zero, -1) @ centred(weights, w_zero, -1)
        projected = (product * (x_scale.to(torch.float64) * w_scale)).to(bias.dtype) + bias
        return rest(projected, mask, past, None)

    return run
