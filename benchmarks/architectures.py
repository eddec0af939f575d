"""Architectures with random weights, as both torch exporters write them: what pruning is measured on.

    for path in exported(ARCHITECTURES["resnet18"], "dynamo", folder): ...

From timm, torchvision and transformers with small configurations, and from `own_networks`. Widths are the real ones
where that is cheap; images are small, since channels and not pixels matter here (resnet18 alone has them of full size,
for its latency). BatchNorm statistics are those of random data, perturbed; every scale, bias and position embedding is
random as well: nothing is the identity by chance.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import own_networks
import torch
from torch import Tensor, nn

Exporter = Literal["dynamo", "torchscript"]
EXPORTERS: tuple[Exporter, ...] = ("dynamo", "torchscript")
TORCHSCRIPT_OPSET = 17
# Part of the name of cached exports: raise it when anything here changes what is exported.
VERSION = 2
BATCH = "batch"
TOKENS = "tokens"


@dataclass(frozen=True)
class Architecture:
    """`build` makes the module; `inputs` its example inputs in order; `dynamic` the named dimensions of each."""

    name: str
    source: str
    build: Callable[[], nn.Module]
    inputs: Mapping[str, Callable[[], Tensor]]
    dynamic: Mapping[str, Mapping[int, str]]


class Outputs(nn.Module):
    """One tensor of what a transformers model returns."""

    def __init__(self, model: nn.Module, key: str, **options: Any) -> None:
        super().__init__()
        self.model, self.key, self.options = model, key, options

    def forward(self, first: Tensor, mask: Tensor | None = None) -> Tensor:
        named = {} if mask is None else {"attention_mask": mask}
        found: Tensor = self.model(first, **named, **self.options)[self.key]
        return found


@functools.cache
def declare_operators() -> torch.library.Library:
    """Wheels of torchvision are built for CUDA: beside torch for CPU it does not import without these.

    The declarations last as long as the returned object, which the cache keeps.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    with contextlib.suppress(RuntimeError):  # a torchvision that fits has declared them itself
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _torchvision(name: str, **options: Any) -> nn.Module:
    declare_operators()
    import torchvision

    module: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return module


def _timm(name: str, **options: Any) -> nn.Module:
    declare_operators()  # timm imports torchvision
    import timm

    module: nn.Module = timm.create_model(name, pretrained=False, exportable=True, **options)
    return module


def _transformer(kind: str) -> nn.Module:
    declare_operators()  # transformers imports torchvision where it is installed
    import transformers as t

    small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "attn_implementation": "eager"}
    wide = {"intermediate_size": 512, "initializer_range": 0.08}
    if kind == "bert":
        return Outputs(t.BertForMaskedLM(t.BertConfig(vocab_size=200, **small, **wide)), "logits")
    if kind == "distilbert":
        config = t.DistilBertConfig(
            vocab_size=200, dim=128, n_layers=2, n_heads=4, hidden_dim=512, attn_implementation="eager"
        )
        return Outputs(t.DistilBertForSequenceClassification(config), "logits")
    if kind == "gpt2":
        shape = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
        tokens = {"vocab_size": 200, "bos_token_id": 0, "eos_token_id": 0}
        config = t.GPT2Config(attn_implementation="eager", **shape, **tokens)
        return Outputs(t.GPT2LMHeadModel(config), "logits", use_cache=False)
    if kind == "llama":
        config = t.LlamaConfig(vocab_size=200, num_key_value_heads=2, **small, **wide)
        return Outputs(t.LlamaForCausalLM(config), "logits", use_cache=False)
    config = t.ViTConfig(image_size=64, patch_size=8, num_labels=10, **small, **wide)
    return Outputs(t.ViTForImageClassification(config), "logits")


def _image(size: int, channels: int = 3) -> dict[str, Callable[[], Tensor]]:
    return {"image": lambda: torch.randn(2, channels, size, size)}


def _ids(vocabulary: int) -> dict[str, Callable[[], Tensor]]:
    return {"ids": lambda: torch.randint(0, vocabulary, (2, 16))}


def _masked_ids(vocabulary: int) -> dict[str, Callable[[], Tensor]]:
    def mask() -> Tensor:
        return (torch.arange(16)[None] < torch.tensor([[16], [11]])).long()

    return {**_ids(vocabulary), "mask": mask}


_IMAGE = {"image": {0: BATCH}}
_SEQUENCE = {0: BATCH, 1: TOKENS}


def _vision(name: str, size: int = 64, *, source: str = "timm", **options: Any) -> Architecture:
    make = _timm if source == "timm" else _torchvision
    return Architecture(name, source, lambda: make(name, **options), _image(size), _IMAGE)


def _language(kind: str, vocabulary: int = 200, *, masked: bool = True) -> Architecture:
    inputs = _masked_ids(vocabulary) if masked else _ids(vocabulary)
    return Architecture(kind, "transformers", lambda: _transformer(kind), inputs, dict.fromkeys(inputs, _SEQUENCE))


def _own(name: str, build: Callable[[], nn.Module], inputs: Mapping[str, Callable[[], Tensor]]) -> Architecture:
    dynamic = {key: _SEQUENCE if key in ("ids", "frames") else {0: BATCH} for key in inputs}
    return Architecture(name, "own", build, inputs, dynamic)


_ALL = (
    _vision("resnet18", 224),
    _vision("mobilenetv2_100"),
    _vision("efficientnet_b0"),
    _vision("mobilenetv3_small_100"),
    _vision("regnety_004"),
    _vision("convnext_atto"),
    _vision("densenet121"),
    _vision("vit_tiny_patch16_224", 64, img_size=64),
    _vision("mixer_s32_224", 64, img_size=64, num_classes=100),
    _vision("swin_tiny_patch4_window7_224", 64, img_size=64, window_size=4),
    _vision("shufflenet_v2_x1_0", source="torchvision"),
    _vision("squeezenet1_1", source="torchvision"),
    _vision("googlenet", source="torchvision", aux_logits=False, init_weights=False),
    _vision("resnext50_32x4d", source="torchvision"),
    _vision("mnasnet0_5", source="torchvision"),
    _language("bert"),
    _language("distilbert"),
    _language("gpt2"),
    _language("llama"),
    Architecture("vit", "transformers", lambda: _transformer("vit"), _image(64), _IMAGE),
    _own("unet", own_networks.UNet, _image(64)),
    _own("lstm_tagger", own_networks.LstmTagger, _ids(500)),
    _own("gru_tagger", own_networks.GruTagger, {"frames": lambda: torch.randn(2, 16, 40)}),
    _own("pixel_shuffle", own_networks.PixelShuffleNet, _image(24)),
    _own("gqa_decoder", own_networks.GqaDecoder, _ids(300)),
    _own("group_norm_1d", own_networks.GroupNormAutoencoder, {"signal": lambda: torch.randn(2, 2, 128)}),
)
# Thousands of nodes by the TorchScript exporter: for the time of an analysis, not for shares.
LARGE = _vision("swin_v2_s", source="torchvision")
ARCHITECTURES: Mapping[str, Architecture] = {architecture.name: architecture for architecture in _ALL}


def make(architecture: Architecture, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module in eval mode with everything in it random, and example inputs by name; the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = architecture.build()
        inputs = {name: draw() for name, draw in architecture.inputs.items()}
        _randomize(module)
        _set_statistics(module, architecture)
    return module.eval(), inputs


@torch.no_grad()
def _randomize(module: nn.Module) -> None:
    """Scales around 1, biases and embeddings around 0; weights stay as the library draws them."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2 and float(parameter.std()) > 0:
            continue
        is_scale = name.endswith(("weight", "gamma", "scale")) and parameter.dim() < 4
        if is_scale:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0, 0.1)


@torch.no_grad()
def _set_statistics(module: nn.Module, architecture: Architecture) -> None:
    """BatchNorm statistics from random data, so that values keep their size through deep nets, then perturbed."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    module.eval()  # detectors ask for targets in training, dropout draws
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    module(*(torch.cat([draw() for _ in range(4)]) for draw in architecture.inputs.values()))
    for norm in norms:
        if norm.running_mean is None or norm.running_var is None:
            continue
        deviation = norm.running_var.sqrt()
        norm.running_mean += 0.3 * deviation * torch.randn_like(deviation)
        norm.running_var *= torch.empty_like(deviation).uniform_(0.5, 1.5)


def exported(architecture: Architecture, exporter: Exporter, folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The ONNX file of the architecture and example inputs; exported once, then taken from `folder`."""
    stem = f"{architecture.name}-{exporter}-v{VERSION}-torch{torch.__version__.partition('+')[0]}"
    path, data = folder / f"{stem}.onnx", folder / f"{architecture.name}-v{VERSION}.npz"
    if not (path.exists() and data.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        module, inputs = make(architecture)
        partial = path.with_suffix(".partial")
        with quiet():
            export(module, inputs, architecture, exporter, partial)
        np.savez(data, **{name: tensor.numpy() for name, tensor in inputs.items()})
        partial.replace(path)
    with np.load(data) as arrays:
        return path, dict(arrays)


def drawn_samples(architecture: Architecture, count: int, seed: int = 1) -> dict[str, np.ndarray]:
    """More inputs of the kind that `make` gives, first axis = samples; the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn: dict[str, list[Tensor]] = {name: [] for name in architecture.inputs}
        while sum(len(tensor) for tensor in next(iter(drawn.values()))) < count:
            for name, draw in architecture.inputs.items():
                drawn[name].append(draw())
    return {name: torch.cat(tensors)[:count].numpy() for name, tensors in drawn.items()}


def dynamic_shapes(architecture: Architecture) -> tuple[dict[int, torch.export.Dim], ...]:
    """The dynamic dimensions of each input, for `torch.export`; those of one name are one and the same."""
    symbols = {dim: torch.export.Dim(dim) for dims in architecture.dynamic.values() for dim in dims.values()}
    named = (architecture.dynamic.get(name, {}) for name in architecture.inputs)
    return tuple({axis: symbols[dim] for axis, dim in dims.items()} for dims in named)


def export(
    module: nn.Module,
    inputs: dict[str, Tensor],
    architecture: Architecture,
    exporter: Exporter,
    path: Path,
    opset: int | None = None,
) -> None:
    """Writes the module as ONNX, its dynamic dimensions named; `opset`: not the exporter's own."""
    arguments, names = tuple(inputs.values()), list(inputs)
    if exporter == "torchscript":
        axes = {name: dict(dims) for name, dims in architecture.dynamic.items()}
        opset = opset or TORCHSCRIPT_OPSET
        torch.onnx.export(
            module, arguments, path, dynamo=False, opset_version=opset, input_names=names, dynamic_axes=axes
        )
        return
    torch.onnx.export(
        module,
        arguments,
        path,
        dynamo=True,
        external_data=False,
        input_names=names,
        dynamic_shapes=dynamic_shapes(architecture),
        verbose=False,
        opset_version=opset,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters speak of their own deprecation and of every tracer decision."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            Path(os.devnull).open("w") as sink,
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def main() -> None:
    """Exports everything and says what does not export."""
    import argparse
    import time

    parser = argparse.ArgumentParser(description="Exports the architectures by both torch exporters.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    arguments = parser.parse_args()
    for architecture in ARCHITECTURES.values():
        if arguments.only and not any(part in architecture.name for part in arguments.only):
            continue
        for exporter in EXPORTERS:
            began = time.perf_counter()
            try:
                path, _ = exported(architecture, exporter, arguments.folder)
                print(f"{architecture.name:30} {exporter:12} {path.stat().st_size / 1e6:7.1f} MB", end=" ")
            except Exception as error:  # noqa: BLE001 - exporters raise anything; the next one may work
                print(f"{architecture.name:30} {exporter:12} {type(error).__name__}: {str(error)[:300]}", end=" ")
            print(f"{time.perf_counter() - began:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
