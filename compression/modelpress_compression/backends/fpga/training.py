"""Fixed-point aware training: the weights move until, rounded, they answer as the float network does.

The float network is the teacher, so that no labels are needed; the student is the emulator's own forward pass, with
gradients that pass what is rounded (straight-through, arXiv 1308.3432). Formats stay as they are. Outputs that are
classes are held to the teacher's probabilities and, weakly, to its scores; others to its numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from modelpress_compression.backends.fpga.emulator import Design, forward, rounded
from modelpress_compression.backends.fpga.formats import Reals
from modelpress_compression.backends.fpga.network import Layer, Linear, Network

EPOCHS, BATCH = 20, 64
LEARNING_RATE = 0.01  # of Adam, in root mean squares of a layer's weights
LEVEL_WEIGHT = 0.1  # of the scores themselves, beside their probabilities
_SEED = 0


def trained(network: Network, design: Design, samples: Reals, tick: Callable[[], None] = lambda: None) -> Network:
    """The network with weights and biases trained on [samples, *shape] for the formats of the design.

    `tick` is called before each step, and may raise.
    """
    given = samples.reshape(-1, *network.input_shape)
    inputs, rounded_inputs = _float32(given), _float32(design.values[network.input].round_input(given))
    float_network = {layer.name: _constants(operation) for layer, operation in network.linear()}
    with torch.inference_mode():
        batches = [inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH)]
        answers = torch.cat([forward(network, batch, float_network, None) for batch in batches])
    answers = answers.clone()  # made in inference mode, it could not be trained against
    latent = {name: tuple(torch.nn.Parameter(each) for each in pair) for name, pair in float_network.items()}
    optimizer = torch.optim.Adam([{"params": pair, "lr": _rate(pair[0])} for pair in latent.values()])
    steps = EPOCHS * -(-len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    variance = max(float(answers.var()), 1e-30)
    generator = np.random.default_rng(_SEED)
    for _ in range(EPOCHS):
        order = torch.from_numpy(generator.permutation(len(inputs)))
        for start in range(0, len(inputs), BATCH):
            tick()
            places = order[start : start + BATCH]
            constants = {name: (rounded(pair[0], design.weights[name]), pair[1]) for name, pair in latent.items()}
            made = forward(network, rounded_inputs[places], constants, design)
            optimizer.zero_grad()
            _distance(made, answers[places], variance).backward()  # type: ignore[no-untyped-call]  # torch
            optimizer.step()
            schedule.step()
    numbers = {name: tuple(each.detach().double().numpy() for each in pair) for name, pair in latent.items()}
    return replace(network, layers=tuple(_with(layer, numbers) for layer in network.layers))


def _constants(operation: Linear) -> tuple[Tensor, Tensor]:
    return _float32(operation.weight), _float32(operation.bias)


def _float32(values: Reals) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _rate(weight: Tensor) -> float:
    return LEARNING_RATE * float(weight.detach().square().mean().sqrt())


def _distance(made: Tensor, wanted: Tensor, variance: float) -> Tensor:
    error = (made - wanted).square().mean() / variance
    if wanted.dim() != 2 or wanted.shape[1] == 1:
        return error
    student, teacher = functional.log_softmax(made, 1), functional.log_softmax(wanted, 1)
    return functional.kl_div(student, teacher, log_target=True, reduction="batchmean") + LEVEL_WEIGHT * error


def _with(layer: Layer, numbers: dict[str, tuple[Reals, ...]]) -> Layer:
    if not isinstance(layer.operation, Linear):
        return layer
    weight, bias = numbers[layer.name]
    return replace(layer, operation=replace(layer.operation, weight=weight, bias=bias))
