"""Rotations of residual streams: what they gain in few bits, on a network with loud channels and on a trained one.

    python benchmarks/rotations.py --models DIR        DIR: with data/fashion.npz (as for real_models.py)

1. A decoder of random weights (seed 0): a table of 500 tokens, three blocks of RMS normalization, product, Relu and
   product (128 and 256 channels), a head; four channels of the stream are 25 times as loud as the others.
2. A small vision transformer (LayerNormalization before attention and products, 96 channels, 4 blocks), trained on
   12,000 pictures of clothes for `--epochs` (seed 0), and judged by 2,000 others.

Of each result: the signal to noise of the output for unseen inputs in dB, the share of right answers, the size, and the
CPU seconds of the step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from architectures import quiet
from modelpress_compression import load
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.model import Model, file_size_bytes
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.fuse.fuse import Fuse
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.runtime import run, session_of
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {"scheme": "static"},
    {"scheme": "static", "weights": "int4"},
    {"scheme": "static", "weights": "int4", "smooth_quant": False},
    {"scheme": "dynamic"},
    {"scheme": "weight_only"},
    {"scheme": "weight_only", "weights": "int4"},
    {"scheme": "weight_only", "weights": "int4", "rounding": "nearest"},
)
GIVEN = 64  # inputs that are quantized from
_HEAD = (
    "| network | quantize | rotate | rotated | SQNR, dB | right | bytes | CPU s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)
Arrays = Mapping[str, NDArray[Any]]


def loud_decoder(path: Path) -> None:
    """Writes network 1."""
    rng, width, inner, tokens, blocks = np.random.default_rng(0), 128, 256, 500, 3
    gain = np.where(np.isin(np.arange(width), [5, 40, 77, 101]), 25.0, 1.0)
    weights: dict[str, Any] = {"table": rng.normal(size=(tokens, width)) * gain, "ones": np.ones(width)}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["s0"], "table")]
    for block in range(blocks):
        weights[f"up{block}"] = rng.normal(size=(width, inner)) / np.sqrt(width)
        weights[f"down{block}"] = rng.normal(size=(inner, width)) / np.sqrt(inner) * gain
        nodes += [
            helper.make_node("SimplifiedLayerNormalization", [f"s{block}", "ones"], [f"n{block}"], axis=-1),
            helper.make_node("MatMul", [f"n{block}", f"up{block}"], [f"u{block}"], f"up{block}"),
            helper.make_node("Relu", [f"u{block}"], [f"r{block}"]),
            helper.make_node("MatMul", [f"r{block}", f"down{block}"], [f"d{block}"], f"down{block}"),
            helper.make_node("Add", [f"s{block}", f"d{block}"], [f"s{block + 1}"]),
        ]
    weights["head"] = rng.normal(size=(width, 64)) / np.sqrt(width)
    nodes += [
        helper.make_node("SimplifiedLayerNormalization", [f"s{blocks}", "ones"], ["last"], axis=-1),
        helper.make_node("MatMul", ["last", "head"], ["y"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 12, 64])],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


class VisionTransformer(nn.Module):
    """Network 2: patches of 7 x 7, normalization before each branch, the mean over patches read by the head."""

    def __init__(self, width: int = 96, blocks: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        answer: Tensor = self.head(self.norm(x).mean(1))
        return answer


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.first, self.second = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        normal = self.first(x)
        q, k, v = (
            layer(normal).reshape(n, t, self.heads, c // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = torch.softmax(q @ k.transpose(2, 3) / (c // self.heads) ** 0.5, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, c))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def trained(images: NDArray[np.float32], labels: NDArray[np.int64], epochs: int, path: Path) -> None:
    """Trains network 2 and writes it."""
    torch.manual_seed(0)
    module = VisionTransformer()
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3, weight_decay=0.05)
    steps = epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            loss = nn.functional.cross_entropy(module(torch.from_numpy(images[batch])), torch.from_numpy(labels[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    module.eval()
    with quiet():
        torch.onnx.export(
            module, (torch.from_numpy(images[:2]),), path, dynamo=False, opset_version=17, input_names=["image"],
            dynamic_axes={"image": {0: "batch"}},
        )  # fmt: skip


def rows(name: str, path: Path, given: Arrays, unseen: Arrays, labels: NDArray[np.int64] | None, folder: Path) -> None:
    """Prints the network's rows of the table."""
    model = load(path)
    context = Context(InputData.from_arrays(given, model.inputs), folder)
    model = Fuse(FuseConfig())(model, context).model
    others = InputData.from_arrays(unseen, model.inputs)
    print(f"| {name} | float32 | | | | {_right(model, unseen, labels)} | {path.stat().st_size} | |", flush=True)
    for options in CONFIGURATIONS:
        for rotate in ("none", "always", "auto"):
            began = time.process_time()
            result = Quantize(QuantizeConfig(**options, rotate=rotate))(model, context)
            seconds = time.process_time() - began
            target = folder / "result.onnx"
            result.model.save(target)
            noise = next(iter(compare_outputs(path, target, others).outputs.values())).sqnr_db
            named = {**options, **({"smooth_quant": "no smooth_quant"} if "smooth_quant" in options else {})}
            written = ", ".join(map(str, named.values()))
            count = result.changes.get("rotated_streams", 0)
            cells = (name, written, rotate, str(count), f"{noise:.1f}", _right(result.model, unseen, labels))
            print("| " + " | ".join((*cells, str(file_size_bytes(target)), f"{seconds:.1f}")) + " |", flush=True)


def _right(model: Model, unseen: Arrays, labels: NDArray[np.int64] | None) -> str:
    if labels is None:
        return ""
    with session_of(model) as session:
        answers = next(iter(run(session, dict(unseen)).values()))
    return f"{float((answers.argmax(1) == labels).mean()):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    print(_HEAD, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loud_decoder(folder / "decoder.onnx")
        ids = np.random.default_rng(1).integers(0, 500, (GIVEN + 200, 12))
        rows("decoder", folder / "decoder.onnx", {"ids": ids[:GIVEN]}, {"ids": ids[GIVEN:]}, None, folder)
        with np.load(options.models / "data" / "fashion.npz") as data:
            images = {key: ((data[key] / 255 - 0.286) / 0.353).astype(np.float32) for key in ("x_train", "x_test")}
            labels = {key: data[key].astype(np.int64) for key in ("y_train", "y_test")}
        trained(images["x_train"], labels["y_train"], options.epochs, folder / "vision.onnx")
        given = {"image": images["x_train"][:GIVEN]}
        unseen = {"image": images["x_test"][:2000]}
        rows("vision", folder / "vision.onnx", given, unseen, labels["y_test"][:2000], folder)


if __name__ == "__main__":
    main()
