"""Scaled dot-product attention (Vaswani et al. 2017) of ONNX, and rotary position embeddings (Su et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.ops.activation import softmax
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site

AFTER_SOFTCAP, AFTER_BIAS, AFTER_SOFTMAX = 1, 2, 3


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * size] -> [batch, heads, tokens, size]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[batch, heads, tokens, size] -> [batch, tokens, heads * size]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def causal_bias(queries: int, keys: int, offset: int | Tensor, like: Tensor) -> Tensor:
    """0 where query i may see key j <= i + offset, -inf elsewhere; an offset for each sample adds axes in front."""
    return _bias(_distance(queries, keys, offset, like) >= 0, like)


def _distance(queries: int, keys: int, offset: int | Tensor, like: Tensor) -> Tensor:
    """How far key j lies behind query i."""
    rows = torch.arange(queries, device=like.device)[:, None]
    columns = torch.arange(keys, device=like.device)
    if isinstance(offset, Tensor):
        return rows + offset.reshape(-1, 1, 1, 1) - columns
    return rows + offset - columns


def _bias(allowed: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, -math.inf)


@dataclass(frozen=True)
class _Attributes:
    causal: bool
    q_heads: int
    kv_heads: int
    scale: float | None
    softcap: float
    mode: int
    left: int
    right: int
    precision: torch.dtype | None
    outputs: int


@operator("Attention", since=23)
def attention(site: Site) -> Function:
    """Outputs y, present key, present value, and the product of queries and keys after a chosen step."""
    options = _Attributes(
        site.flag("is_causal"), site.integer("q_num_heads", 0), site.integer("kv_num_heads", 0),
        site.number("scale", 0.0) if "scale" in site.node.attributes else None, site.number("softcap", 0.0),
        site.integer("qk_matmul_output_mode", 0), site.integer("left_window_size", -1),
        site.integer("right_window_size", -1), site.torch_type("softmax_precision"), site.outputs,
    )  # fmt: skip
    return lambda *inputs: _attention(options, *inputs)


def _attention(
    options: _Attributes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, past_k: Tensor | None = None,
    past_v: Tensor | None = None, lengths: Tensor | None = None,
) -> Any:  # fmt: skip
    flat = q.dim() == 3
    if flat:
        q, k, v = split_heads(q, options.q_heads), split_heads(k, options.kv_heads), split_heads(v, options.kv_heads)
    past = 0 if past_k is None else past_k.shape[2]
    k = k if past_k is None else torch.cat([past_k, k], 2)
    v = v if past_v is None else torch.cat([past_v, v], 2)
    offset = past if lengths is None or past_k is not None else lengths - q.shape[2]
    bias = _combined(options, q, k, mask, offset, lengths)
    y, product = attend(
        q, k, v, bias, options.scale, softcap=options.softcap, mode=options.mode, precision=options.precision,
        with_product=options.outputs > 3,
    )  # fmt: skip
    y = merge_heads(y) if flat else y
    return (y, k, v, product) if options.outputs > 1 else y


def _combined(
    options: _Attributes, q: Tensor, k: Tensor, mask: Tensor | None, offset: int | Tensor, lengths: Tensor | None
) -> Tensor | None:
    """All masks as one that is added; None without any."""
    queries, keys = q.shape[2], k.shape[2]
    bias: Tensor | None = None
    if mask is not None:
        bias = _bias(mask, q) if mask.dtype == torch.bool else mask
        if bias.shape[-1] < keys:
            bias = F.pad(bias, (0, keys - bias.shape[-1]), value=-math.inf)
    parts = [] if bias is None else [bias]
    if options.causal:
        parts.append(causal_bias(queries, keys, offset, q))
    if options.left >= 0 or options.right >= 0:
        distance = _distance(queries, keys, offset, q)
        inside = torch.ones_like(distance, dtype=torch.bool)
        inside = inside & (distance <= options.left) if options.left >= 0 else inside
        inside = inside & (-distance <= options.right) if options.right >= 0 else inside
        parts.append(_bias(inside, q))
    if lengths is not None:
        parts.append(_bias(torch.arange(keys, device=q.device) < lengths.reshape(-1, 1, 1, 1), q))
    return sum(parts[1:], parts[0]) if parts else None


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, *, softcap: float = 0.0, mode: int = 0,
    precision: torch.dtype | None = None, with_product: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """q [batch, heads, queries, size], k and v with as many heads or a divisor of them. A query that may see nothing
    gives 0. Returns (y, the product of queries and keys if wanted)."""
    if k.shape[1] != q.shape[1]:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    factor = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
    hidden = None if bias is None else torch.isneginf(bias.amax(-1, keepdim=True))
    blind = hidden is not None and bool(hidden.any())
    if q.element_size() >= 4 and not (softcap or with_product or precision or blind):
        return F.scaled_dot_product_attention(q, k, v, bias, scale=factor), None
    root = float(
        torch.tensor(math.sqrt(factor), dtype=q.dtype)
    )  # in the precision of the values, as the standard has it
    product = (q * root) @ (k * root).transpose(-1, -2)
    capped = softcap * torch.tanh(product / softcap) if softcap else product
    biased = capped if bias is None else capped + bias
    logits = biased if precision is None else biased.to(precision)
    weights = softmax(logits, -1)
    if hidden is not None and blind:
        weights = weights.masked_fill(hidden, 0.0)
    y = weights.to(q.dtype) @ v
    shown = {AFTER_SOFTCAP: capped, AFTER_BIAS: biased, AFTER_SOFTMAX: weights}.get(mode, product)
    return y, shown.to(q.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, size: int, interleaved: bool) -> Tensor:
    """Turns the first `size` elements of the last axis; x [batch, tokens, heads, head size], cos and sin
    [batch, tokens, size / 2]."""
    turned, rest = x[..., :size], x[..., size:]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    parts = [real, imaginary]
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned, rest], -1)


@operator("RotaryEmbedding", since=23)
def rotary_embedding(site: Site) -> Function:
    """x [batch, heads, tokens, size] or [batch, tokens, heads * size]."""
    interleaved, heads, part = (
        site.flag("interleaved"),
        site.integer("num_heads", 0),
        site.integer("rotary_embedding_dim", 0),
    )

    def run(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
        value = x.transpose(1, 2) if x.dim() == 4 else x.reshape(x.shape[0], x.shape[1], heads, -1)
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        y = rotate(value, cos, sin, part or value.shape[-1], interleaved)
        return y.transpose(1, 2) if x.dim() == 4 else y.reshape(x.shape)

    return run
