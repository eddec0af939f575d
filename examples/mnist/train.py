"""Trains the ConvNet on `digits.npz` and writes it in every kind of file that modelpress reads, with its data.

    python examples/mnist/train.py [--seed 0] [--output-dir examples/mnist]

The same seed gives the same weights on the same machine and version of torch. Takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from convnet import ConvNet
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent
MEAN, STANDARD_DEVIATION = 0.1307, 0.3081  # of the pixels of MNIST's training set, in [0, 1]
EPOCHS = 40
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 3e-3
SAMPLES = 256  # training digits in samples.npz


def normalize(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels [count, 1, 28, 28] as the model takes them."""
    return ((images / 255.0 - MEAN) / STANDARD_DEVIATION).astype(np.float32)


def train(images: Tensor, labels: Tensor, seed: int) -> ConvNet:
    """A ConvNet in evaluation mode. `images`: float32 [count, 1, 28, 28]; `labels`: int64 [count]."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the order of sums, and so the weights, must not depend on the number of cores
    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters())
    steps = -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=EPOCHS * steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = nn.functional.nll_loss(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:2}/{EPOCHS}: loss {total / steps:.4f}")
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of digits that the model names rightly."""
    with torch.no_grad():
        return (model(images).argmax(dim=1) == labels).float().mean().item()


def write_models(model: ConvNet, folder: Path) -> None:
    """The model as TorchScript (scripted and traced), exported program, state dict, safetensors and ONNX."""
    example = torch.zeros(2, 1, 28, 28)
    dynamic_shapes = {"x": {0: torch.export.Dim("batch", min=1, max=1024)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and still what people have
        torch.jit.save(torch.jit.script(model), folder / "model_scripted.pt")
        torch.jit.save(torch.jit.trace(model, example), folder / "model_traced.pt")
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=dynamic_shapes), folder / "model.pt2")
    torch.save(model.state_dict(), folder / "state_dict.pt")
    save_file(model.state_dict(), folder / "state_dict.safetensors")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about torch
        torch.onnx.export(
            model,
            (example,),
            folder / "model.onnx",
            input_names=["x"],
            output_names=["log_probabilities"],
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            external_data=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the MNIST example.")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights, the dropout and the order (default 0)"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=FOLDER, help="where the files go (default: beside this file)"
    )
    arguments = parser.parse_args()
    digits = np.load(FOLDER / "digits.npz")
    x_train, x_test = normalize(digits["images_train"]), normalize(digits["images_test"])
    y_train, y_test = digits["labels_train"].astype(np.int64), digits["labels_test"].astype(np.int64)

    model = train(torch.from_numpy(x_train), torch.from_numpy(y_train), arguments.seed)
    print(f"test accuracy {accuracy(model, torch.from_numpy(x_test), torch.from_numpy(y_test)):.4f}")

    folder: Path = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_models(model, folder)
    np.savez_compressed(folder / "samples.npz", x=x_train[:SAMPLES])
    np.savez_compressed(folder / "eval.npz", x=x_test, labels=y_test)


if __name__ == "__main__":
    main()
