"""The models of `breadth`, and what writes them to files.

The networks of `breadth_vision` and `breadth_language`; classifiers of scikit-learn, LightGBM and XGBoost, whose own
exporters write them; networks of Keras and Paddle, which a Python of their own writes (`breadth_foreign`), named by the
variables MODELPRESS_TENSORFLOW_PYTHON and MODELPRESS_PADDLE_PYTHON.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import breadth_foreign
import breadth_language
import breadth_vision
import numpy as np
import onnx
import torch
from architectures import BATCH, TOKENS, Architecture, quiet
from torch import Tensor, nn

# Extents of dynamic dimensions other than those that a model is written and calibrated with.
OTHER = {BATCH: 3, TOKENS: 11}
AUTHOR = ("author", "breadth")
NEWEST_OPSET = 23  # that torch's exporter writes


class NotMade(Exception):  # noqa: N818  an outcome: the producer does not write this model
    """The producer refuses the model, so that there is no file to load."""


NETWORKS: Mapping[str, Architecture] = {one.name: one for one in (*breadth_vision.NETWORKS, *breadth_language.NETWORKS)}


@dataclass(frozen=True)
class Made:
    """A written model: its files, what the user has to say of its inputs, and feeds with what the model gives.

    `feeds[0]` has the extents that the model was written with; where it has dynamic dimensions, `feeds[1]` has others.
    `expected[i]`: the outputs in order. `dynamic`: input -> axis -> name, as far as the producer keeps them.
    """

    path: Path
    specs: tuple[str, ...]
    feeds: tuple[dict[str, np.ndarray], ...]
    expected: tuple[tuple[np.ndarray, ...], ...]
    dynamic: bool


def made(name: str, producer: str, folder: Path) -> Made:
    """The model of that name as that producer writes it. Raises NotMade."""
    if name in CLASSIFIERS:
        return CLASSIFIERS[name](folder)
    if name in breadth_foreign.KERAS or name in breadth_foreign.PADDLE:
        return _foreign(name, producer, folder)
    architecture = NETWORKS[name]
    with quiet():
        module, inputs = architectures.make(architecture)
        keeps = producer in _DYNAMIC and bool(architecture.dynamic)
        feeds = [inputs, *([_resized(inputs, architecture)] if keeps else [])]
        try:
            path = _PRODUCERS[producer](module, inputs, architecture, folder)
        except Exception as error:
            raise NotMade(f"{type(error).__name__}: {_plain(str(error))[:200]}") from error
        expected = _expected(_opened(path) or module, feeds)
    keeps = len(expected) > 1
    dynamic = architecture.dynamic if keeps else {}
    specs = tuple(_spec(*item, dynamic.get(item[0], {})) for item in inputs.items()) if producer in _TOLD else ()
    arrays = tuple({key: tensor.numpy() for key, tensor in feed.items()} for feed in feeds)
    return Made(path, specs, arrays, expected, keeps)


def _plain(text: str) -> str:
    """One line, without the colours of a terminal and the folders of this machine."""
    uncoloured = re.sub("\x1b\\[[0-9;]*m", "", text)
    return " ".join(re.sub(r"(?<![\w:/])/(?:[\w.-]+/)+", "", uncoloured).split())


def _opened(path: Path) -> Callable[..., Any] | None:
    """What the file itself computes: a trace may be another network at other extents. None: only torch's own says."""
    if path.suffix == ".pt":
        module: Callable[..., Any] = torch.jit.load(path)
        return module
    return torch.export.load(path).module() if path.suffix == ".pt2" else None


def _expected(network: Callable[..., Any], feeds: list[dict[str, Tensor]]) -> tuple[tuple[np.ndarray, ...], ...]:
    """Its outputs; at the first extents alone where it knows no others."""
    with torch.no_grad():
        found = [_flat(network(*feeds[0].values()))]
        try:
            found += [_flat(network(*feed.values())) for feed in feeds[1:]]
        except Exception:  # noqa: BLE001  what a trace does with extents that it was not made for
            del feeds[1:]
    return tuple(found)


def _flat(found: Any) -> tuple[np.ndarray, ...]:
    return tuple(tensor.numpy() for tensor in (found if isinstance(found, tuple | list) else (found,)))


def _resized(inputs: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The inputs with other extents, cut or repeated."""
    resized = {}
    for name, tensor in inputs.items():
        for axis, dim in architecture.dynamic.get(name, {}).items():
            tensor = tensor.index_select(axis, torch.arange(OTHER[dim]) % tensor.shape[axis])  # noqa: PLW2901
        resized[name] = tensor
    return resized


def _spec(name: str, tensor: Tensor, dynamic: Mapping[int, str]) -> str:
    dims = ",".join(str(dynamic.get(axis, extent)) for axis, extent in enumerate(tensor.shape))
    return f"{name}:{str(tensor.dtype).removeprefix('torch.')}[{dims}]"


def _traced(module: nn.Module, inputs: dict[str, Tensor], architecture: Architecture, folder: Path) -> Path:
    torch.jit.save(torch.jit.trace(module, tuple(inputs.values()), check_trace=False), folder / "model.pt")
    return folder / "model.pt"


def _scripted(module: nn.Module, inputs: dict[str, Tensor], architecture: Architecture, folder: Path) -> Path:
    torch.jit.save(torch.jit.script(module), folder / "model.pt")
    return folder / "model.pt"


def _program(dynamic: bool) -> Callable[[nn.Module, dict[str, Tensor], Architecture, Path], Path]:
    def write(module: nn.Module, inputs: dict[str, Tensor], architecture: Architecture, folder: Path) -> Path:
        shapes = architectures.dynamic_shapes(architecture) if dynamic else None
        program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=shapes)
        torch.export.save(program, folder / "model.pt2")
        return folder / "model.pt2"

    return write


def _onnx(
    exporter: architectures.Exporter, opset: int | None = None
) -> Callable[[nn.Module, dict[str, Tensor], Architecture, Path], Path]:
    def write(module: nn.Module, inputs: dict[str, Tensor], architecture: Architecture, folder: Path) -> Path:
        path = folder / "model.onnx"
        architectures.export(module, inputs, architecture, exporter, path, opset)
        proto = onnx.load(path)
        onnx.helper.set_model_props(proto, dict([AUTHOR]))
        onnx.save(proto, path)
        return path

    return write


def _state_dict(module: nn.Module, inputs: dict[str, Tensor], architecture: Architecture, folder: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": module.state_dict()}, folder / "model.pth")
    return folder / "model.pth"


def build(name: str) -> nn.Module:
    """The network of that name, for `--architecture`."""
    return architectures.make(NETWORKS[name])[0]


_PRODUCERS: Mapping[str, Callable[[nn.Module, dict[str, Tensor], Architecture, Path], Path]] = {
    "traced": _traced,
    "scripted": _scripted,
    "pt2": _program(dynamic=False),
    "pt2 dynamic": _program(dynamic=True),
    "onnx dynamo": _onnx("dynamo"),
    "onnx legacy": _onnx("torchscript"),
    "onnx opset 11": _onnx("torchscript", 11),
    "onnx newest": _onnx("dynamo", NEWEST_OPSET),
    "state dict": _state_dict,
}
PRODUCERS = tuple(_PRODUCERS)
_DYNAMIC = frozenset(PRODUCERS) - {"pt2"}
_TOLD = frozenset(("traced", "scripted", "state dict"))


def _table() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 8)).astype(np.float32)
    return rows, (rows[:, 0] + rows[:, 1] ** 2 > 0.5).astype(np.int64) + (rows[:, 2] > 1)


def _scikit_learn(estimator: Callable[[], Any]) -> Callable[[Path], Made]:
    def write(folder: Path) -> Made:
        rows, classes = _table()
        try:
            from skl2onnx import to_onnx

            fitted = estimator().fit(rows, classes)
            proto = to_onnx(fitted, rows[:1], options={"zipmap": False}, target_opset=15)
        except Exception as error:
            raise NotMade(f"{type(error).__name__}: {error}") from error
        return _classifier(proto, fitted, folder)

    return write


def _boosted(library: str) -> Callable[[Path], Made]:
    def write(folder: Path) -> Made:
        rows, classes = _table()
        try:
            import onnxmltools
            from onnxmltools.convert.common.data_types import FloatTensorType

            if library == "lightgbm":
                import lightgbm

                fitted = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1).fit(rows, classes)
            else:
                import xgboost

                fitted = xgboost.XGBClassifier(n_estimators=5).fit(rows, classes)
            convert = getattr(onnxmltools, f"convert_{library}")
            options = {"zipmap": False} if library == "lightgbm" else {}
            kinds = [("rows", FloatTensorType([None, 8]))]
            proto = convert(fitted, initial_types=kinds, target_opset=15, **options)
        except Exception as error:
            raise NotMade(f"{type(error).__name__}: {error}") from error
        return _classifier(proto, fitted, folder)

    return write


def _classifier(proto: onnx.ModelProto, fitted: Any, folder: Path) -> Made:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    rows, _ = _table()
    name = proto.graph.input[0].name
    feeds = ({name: rows[:8]}, {name: rows[8:11]})
    expected = tuple((fitted.predict(next(iter(feed.values()))),) for feed in feeds)
    return Made(path, (), feeds, expected, dynamic=True)


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression())


def _forest() -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(5, random_state=0)


def _perceptron() -> Any:
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier((64, 64), max_iter=50, random_state=0)


CLASSIFIERS: Mapping[str, Callable[[Path], Made]] = {
    "logistic regression": _scikit_learn(_logistic),
    "random forest": _scikit_learn(_forest),
    "perceptron": _scikit_learn(_perceptron),
    "lightgbm": _boosted("lightgbm"),
    "xgboost": _boosted("xgboost"),
}


# The Python that has what a producer needs; of another producer ours has it.
_PYTHONS = {
    "tf2onnx": "MODELPRESS_TENSORFLOW_PYTHON",
    "keras on tensorflow": "MODELPRESS_TENSORFLOW_PYTHON",
    "paddle2onnx": "MODELPRESS_PADDLE_PYTHON",
}


def lacks_library(producer: str) -> bool:
    """Whether no Python is named that has what the producer needs: then its cells are not run."""
    variable = _PYTHONS.get(producer)
    return variable is not None and not os.environ.get(variable)


def _foreign(name: str, producer: str, folder: Path) -> Made:
    """A network of another library. What the file gives in onnxruntime is what counts: no outputs come along."""
    variable = _PYTHONS.get(producer)
    python = os.environ.get(variable, "") if variable else sys.executable
    if not python:
        raise NotMade(f"{variable} names no Python that has the library")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or variable is None}
    script = str(Path(breadth_foreign.__file__).resolve())
    command = [python, script, producer, name, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotMade(_why(done.stderr))
    feeds: dict[str, dict[str, np.ndarray]] = {}
    with np.load(folder / "feeds.npz") as arrays:
        for key in arrays:
            number, _, of = key.partition("/")
            feeds.setdefault(number, {})[of] = arrays[key]
    return Made(folder / "model.onnx", (), tuple(feeds.values()), ((),) * len(feeds), dynamic=True)


def _why(said: str) -> str:
    """The last exception in what a process said, which may go on in lines of its own; else the last line."""
    lines = ["", *said.strip().splitlines()]
    named = (line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line))
    return _plain(next(named, lines[-1]))[:300]


def warm_up() -> None:
    """Everything that a cell imports is imported: exporters do so as they run."""
    breadth_vision.vision_library()
    for library in ("timm", "torchvision", "transformers"):
        importlib.import_module(library)
    one = Architecture("one", "own", lambda: nn.Linear(2, 2), {"x": lambda: torch.randn(2, 2)}, {"x": {0: BATCH}})
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder, quiet():
        module, inputs = architectures.make(one)
        for write in _PRODUCERS.values():
            write(module, inputs, one, Path(folder))


def cells() -> list[tuple[str, str]]:
    """Every model with every producer that may write it."""
    return [
        *((name, producer) for name in NETWORKS for producer in PRODUCERS),
        *((name, "onnx") for name in CLASSIFIERS),
        *((name, producer) for name in breadth_foreign.KERAS for producer in breadth_foreign.KERAS_PRODUCERS),
        *((name, producer) for name in breadth_foreign.PADDLE for producer in breadth_foreign.PADDLE_PRODUCERS),
    ]
