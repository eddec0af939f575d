"""Fourier transforms, windows and mel filters. Complex values have a last axis of two: real, imaginary."""

from __future__ import annotations

import math

import numpy as np
import torch
from onnx_ir import DataType
from torch import Tensor

from modelpress_compression.executor.dtypes import torch_type
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site


def _fourier(x: Tensor, length: int | None, axis: int, inverse: bool, onesided: bool) -> Tensor:
    """x [..., 1 or 2]; `axis` counts with the last axis."""
    dim = axis % x.dim()
    x = x.to(torch.float64)  # sums of many terms, of which few operators are made
    values = x[..., 0] if x.shape[-1] == 1 else torch.view_as_complex(x.contiguous())
    if inverse and onesided:
        count = length if length is not None else 2 * (x.shape[dim] - 1)
        real: Tensor = torch.fft.irfft(values, count, dim)
        return real.unsqueeze(-1)
    count = x.shape[dim] if length is None else length
    if inverse:
        return torch.view_as_real(torch.fft.ifft(values, count, dim))
    spectrum = torch.fft.fft(values, count, dim)
    if onesided:
        spectrum = spectrum.narrow(dim, 0, count // 2 + 1)
    result: Tensor = torch.view_as_real(spectrum.resolve_conj())
    return result


@operator("DFT", since=17)
def dft(site: Site) -> Function:
    """The axis is an attribute up to opset 19, then the third input."""
    inverse, onesided = site.flag("inverse"), site.flag("onesided")
    fixed = site.integer("axis", 1) if site.version < 20 else None
    read_length, read_axis = site.reader(1), site.reader(2)

    def run(*inputs: Tensor) -> Tensor:
        length = read_length(*inputs)
        axis = (fixed,) if fixed is not None else read_axis(*inputs) or (-2,)
        return _fourier(inputs[0], length[0] if length else None, axis[0], inverse, onesided).to(inputs[0].dtype)

    return run


@operator("STFT", since=17)
def stft(site: Site) -> Function:
    """[batch, frames, bins, 2] of a signal [batch, samples, 1 or 2]."""
    onesided = site.flag("onesided", True)
    read_step, read_length = site.reader(1), site.reader(3)

    def run(*inputs: Tensor) -> Tensor:
        signal, window = inputs[0], inputs[2] if len(inputs) > 2 else None
        (step,), given = read_step(*inputs), read_length(*inputs)
        length = given[0] if given else (window.shape[0] if window is not None else signal.shape[1])
        frames = signal.unfold(1, length, step).transpose(-1, -2)
        if window is not None:
            frames = frames * window.reshape(-1, 1)
        return _fourier(frames, length, -2, False, onesided).to(signal.dtype)

    return run


@operator("MelWeightMatrix", since=17)
def mel_weight_matrix(site: Site) -> Function:
    """[bins of the spectrum, mel bins]: triangles that are evenly spaced on the mel scale."""
    dtype = torch_type(DataType(site.integer("output_datatype", 1)))

    def run(bins: Tensor, length: Tensor, rate: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        count, size = int(bins), int(length)
        low, high = (2595 * math.log10(1 + float(edge) / 700) for edge in (lowest, highest))
        mels = np.arange(count + 2) * ((high - low) / (count + 2)) + low
        edges = ((size + 1) * (700 * (10 ** (mels / 2595) - 1)) // int(rate)).astype(int)
        result = np.zeros((size // 2 + 1, count))
        for column in range(count):
            left, middle, right = edges[column : column + 3]
            if left == middle:
                result[middle, column] = 1
            else:
                result[left : middle + 1, column] = np.arange(middle - left + 1) / (middle - left)
            if right > middle:
                result[middle:right, column] = np.arange(right - middle, 0, -1) / (right - middle)
        return torch.from_numpy(result).to(dtype)

    return run


def _window_terms(site: Site, length: int) -> tuple[Tensor, torch.dtype]:
    periodic = site.flag("periodic", True)
    steps = torch.arange(length, dtype=torch.float64)
    angle = 2 * math.pi * steps / (length if periodic else length - 1)
    return angle, torch_type(DataType(site.integer("output_datatype", 1)))


_WINDOWS = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25 / 46, 21 / 46, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


@operator(*_WINDOWS)
def window(site: Site) -> Function:
    """a - b cos(t) + c cos(2t)."""
    a, b, c = _WINDOWS[site.node.op_type]
    read = site.reader(0)

    def run(size: Tensor) -> Tensor:
        angle, dtype = _window_terms(site, read(size)[0])
        return (a - b * torch.cos(angle) + c * torch.cos(2 * angle)).to(dtype)

    return run
