"""Inputs for training where no data is given: made from the original model itself, in a bounded time.

    images, signals    optimized for normalization statistics and classes     inversion
    token sequences    drawn from the model, or exchanged token by token       token_inputs
    anything else      plausible random inputs                                graph.synthetic

Whatever is made, training learns it by heart to a degree, and nothing that can be measured without real inputs tells to
which: the distance on inputs of another kind, which training never saw, fell where a metric fell, and grew where it
rose (docs/distillation.md). The report says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from modelpress_compression.executor import NotExecutableError, device_for
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.distill.inversion import Inverter, find_inverter
from modelpress_compression.passes.distill.token_inputs import Feed, TokenMaker, find_token_input, with_lengths

SAMPLES = 512
TOKEN_SAMPLES = 256
BATCH_SIZE = 32
# For making inputs: at most this part of the time that training has, and no more than this in any case.
SHARE_OF_TIME = 0.3
MAX_SECONDS = 60.0
CONFIDENCE = (
    "Confidence is low: of six trained models that were cut and trained without data, two gained 12 and 33 points of "
    "their metric on real inputs, four less than one or nothing."
)


def made_inputs(original: Model, context: Context, seed: int, stop_at: float) -> tuple[InputData, str]:
    """Inputs for training until `stop_at`, on `time.monotonic()`, and how they were made. Raises
    ModelNotRunnableError."""
    data = synthetic_inputs(original, samples=SAMPLES, seed=seed)
    now = time.monotonic()
    until = min(now + MAX_SECONDS, now + SHARE_OF_TIME * (stop_at - now))
    device = device_for(context.target.device)
    if (inverter := find_inverter(original, data, device, seed)) is not None:
        return _optimized(data, inverter, context, until), inverter.how
    if (sequences := made_sequences(original, data.head(TOKEN_SAMPLES), context, seed, until)) is not None:
        return sequences
    return data, "plausible random ones, since the graph holds neither normalization statistics nor scores to aim at"


def made_sequences(
    original: Model, data: InputData, context: Context, seed: int, until: float
) -> tuple[InputData, str] | None:
    """Token sequences in the place of the random ones of `data`, and how they were made; None where the model takes
    none, or has no output that tells them apart. Raises ModelNotRunnableError."""
    maker = _token_maker(original, data, device_for(context.target.device), seed)
    if maker is None:
        return None
    return _exchanged(with_lengths(data, seed), maker, context, until), maker.how


def _token_maker(original: Model, data: InputData, device: torch.device, seed: int) -> TokenMaker | None:
    tokens = find_token_input(original, data)
    if tokens is None:
        return None
    try:
        return TokenMaker.of(original, tokens, device, seed)
    except NotExecutableError:
        return None


def _optimized(data: InputData, inverter: Inverter, context: Context, until: float) -> InputData:
    """The samples batch by batch. What the time runs out on stays random noise, which harms more than it helps: it is
    left out, but for the first batch."""
    batches: list[Feed] = []
    for feed in _batches(data, context, inverter.executor.device):
        optimized = inverter.optimized(feed, until)
        if batches and time.monotonic() > until:
            break
        batches.append(optimized)
    return _joined(data, batches)


def _exchanged(data: InputData, maker: TokenMaker, context: Context, until: float) -> InputData:
    """The samples batch by batch, each in an equal share of the time that is left. What it runs out on keeps random
    tokens, which are inputs that the model can get."""
    size = data.fixed_batch or BATCH_SIZE
    batches: list[Feed] = []
    for feed in _batches(data, context, maker.device):
        now = time.monotonic()
        left = max(1, -(-len(data) // size) - len(batches))
        batches.append(maker.make(feed, now + (until - now) / left))
    return _joined(data, batches)


def _batches(data: InputData, context: Context, device: torch.device) -> Iterator[Feed]:
    size = data.fixed_batch or BATCH_SIZE
    for number, feed in enumerate(data.feeds(size)):
        context.progress(0.0, f"making inputs: batch {number + 1} of {-(-len(data) // size)}")
        yield {name: torch.from_numpy(np.array(array)).to(device) for name, array in feed.items()}


def _joined(data: InputData, batches: Sequence[Feed]) -> InputData:
    arrays = {name: np.concatenate([batch[name].detach().cpu().numpy() for batch in batches]) for name in batches[0]}
    return replace(data, arrays=arrays)
