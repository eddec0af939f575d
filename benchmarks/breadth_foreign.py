"""Networks of Keras and Paddle for `breadth`, as their own exporters write them.

    PYTHON benchmarks/breadth_foreign.py PRODUCER NAME FOLDER

PYTHON is one that has the libraries: TensorFlow and Paddle hold other libraries back to versions that ours are beyond.
Writes FOLDER/model.onnx, and FOLDER/feeds.npz with arrays NUMBER/INPUT: feeds of two extents of the batch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

BATCHES = (2, 3)
_WORDS, _TOKENS, _SIDE = 100, 12, 32


def _images() -> Any:
    import keras

    return keras.Input((_SIDE, _SIDE, 3), name="image")


def _ids() -> Any:
    import keras

    return keras.Input((_TOKENS,), dtype="int32", name="ids")


def _keras_convnet() -> Any:
    """Strides with uneven padding, separable convolutions, normalization behind each: what MobileNets are made of."""
    import keras
    from keras import layers

    image = _images()
    x = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(image)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.SeparableConv2D(32, 3, strides=2, padding="same", use_bias=False)(x)
    x = layers.Activation("swish")(layers.BatchNormalization()(x))
    y = layers.Conv2D(32, 1)(layers.DepthwiseConv2D(3, padding="same")(x))
    x = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
    return keras.Model(image, layers.Dense(10, activation="softmax")(x))


def _keras_unet() -> Any:
    """One level down and up again: transposed convolution, resizing, joined channels."""
    import keras
    from keras import layers

    image = _images()
    high = layers.Conv2D(16, 3, padding="same", activation="relu")(image)
    low = layers.Conv2D(32, 3, padding="same", activation="relu")(layers.MaxPooling2D()(high))
    up = layers.Conv2DTranspose(16, 3, strides=2, padding="same")(low)
    near = layers.UpSampling2D(interpolation="bilinear")(layers.Conv2D(16, 1)(low))
    return keras.Model(image, layers.Conv2D(4, 1)(layers.Concatenate()([high, up, near])))


def _keras_lstm() -> Any:
    import keras
    from keras import layers

    ids = _ids()
    x = layers.Bidirectional(layers.LSTM(24, return_sequences=True))(layers.Embedding(_WORDS, 16)(ids))
    return keras.Model(ids, layers.Dense(7)(layers.GRU(24)(x)))


def _keras_transformer() -> Any:
    import keras
    from keras import layers

    ids = _ids()
    x = layers.Embedding(_WORDS, 64)(ids)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 16)(x, x))
    x = layers.LayerNormalization()(x + layers.Dense(64)(layers.Dense(128, activation="gelu")(x)))
    return keras.Model(ids, layers.Dense(_WORDS)(x))


def _paddle_convnet() -> Any:
    from paddle import nn

    def block(inputs: int, outputs: int, groups: int = 1) -> Any:
        layer = nn.Conv2D(inputs, outputs, 3, stride=2, padding=1, groups=groups, bias_attr=False)
        return nn.Sequential(layer, nn.BatchNorm2D(outputs), nn.Hardswish())

    pool = (nn.AdaptiveAvgPool2D(1), nn.Flatten())
    return nn.Sequential(block(3, 16), block(16, 32), block(32, 32, 32), *pool, nn.Linear(32, 10), nn.Softmax())


def _paddle_gru() -> Any:
    import paddle
    from paddle import nn

    class Tagger(nn.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(_WORDS, 16), nn.Linear(48, 7)
            self.layers = nn.GRU(16, 24, direction="bidirect")

        def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
            return self.head(self.layers(self.embedding(ids))[0])

    return Tagger()


def _paddle_transformer() -> Any:
    from paddle import nn

    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0)
    return nn.Sequential(nn.Embedding(_WORDS, 64), nn.TransformerEncoder(layer, 1), nn.Linear(64, _WORDS))


KERAS: Mapping[str, Callable[[], Any]] = {
    "keras convnet": _keras_convnet,
    "keras unet": _keras_unet,
    "keras lstm": _keras_lstm,
    "keras transformer": _keras_transformer,
}
PADDLE: Mapping[str, Callable[[], Any]] = {
    "paddle convnet": _paddle_convnet,
    "paddle gru": _paddle_gru,
    "paddle transformer": _paddle_transformer,
}


def _feeds(inputs: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
    """Arrays for inputs of those shapes, without the batch, and types."""
    rng = np.random.default_rng(0)
    return {
        f"{number}/{name}": rng.standard_normal((batch, *shape)).astype(dtype)
        if dtype == "float32"
        else rng.integers(0, _WORDS, (batch, *shape)).astype(dtype)
        for number, batch in enumerate(BATCHES)
        for name, (shape, dtype) in inputs.items()
    }


def _lively_keras(model: Any) -> None:
    """Statistics and offsets that are not the identity."""
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.path.rsplit("/")[-1] in ("moving_mean", "beta", "bias", "moving_variance", "gamma"):
            least = 0.5 if weight.path.endswith(("variance", "gamma")) else -0.5
            weight.assign(rng.uniform(least, least + 1.0, weight.shape))


def _write_keras(name: str, path: Path, producer: str) -> dict[str, np.ndarray]:
    import keras

    keras.utils.set_random_seed(0)
    model = KERAS[name]()
    _lively_keras(model)
    feeds = _feeds({one.name: (tuple(one.shape[1:]), one.dtype) for one in model.inputs})
    model(next(iter(feeds.values())))  # Keras exports what was called
    if producer == "tf2onnx":
        import tensorflow as tf
        import tf2onnx

        signature = [tf.TensorSpec(one.shape, one.dtype, one.name) for one in model.inputs]
        tf2onnx.convert.from_function(
            tf.function(lambda *given: model(list(given))), signature, opset=17, output_path=str(path)
        )
    else:
        model.export(str(path), format="onnx", verbose=False)
    return feeds


def _write_paddle(name: str, path: Path, producer: str) -> dict[str, np.ndarray]:
    import paddle

    paddle.seed(0)
    model = PADDLE[name]()
    model.eval()
    shape, dtype = ((3, _SIDE, _SIDE), "float32") if name == "paddle convnet" else ((_TOKENS,), "int64")
    spec = paddle.static.InputSpec([None, *shape], dtype, "x")
    paddle.onnx.export(model, str(path.with_suffix("")), input_spec=[spec], opset_version=17)
    return _feeds({"x": (shape, dtype)})


# What writes a model -> the backend that Keras is told, and the function.
_PRODUCERS: Mapping[str, tuple[str, Callable[[str, Path, str], dict[str, np.ndarray]]]] = {
    "tf2onnx": ("tensorflow", _write_keras),
    "keras on tensorflow": ("tensorflow", _write_keras),
    "keras on torch": ("torch", _write_keras),
    "paddle2onnx": ("", _write_paddle),
}
KERAS_PRODUCERS = ("tf2onnx", "keras on tensorflow", "keras on torch")
PADDLE_PRODUCERS = ("paddle2onnx",)


def main() -> int:
    producer, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    os.environ["KERAS_BACKEND"], write = _PRODUCERS[producer]
    feeds = write(name, folder / "model.onnx", producer)
    np.savez(folder / "feeds.npz", **feeds)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
