"""The models of `breadth`: architectures in small, and what writes them to files.

Those of `architectures`, and beside them detection, segmentation, speech, encoder and decoder, state spaces, graphs,
recommendation and diffusion; and classifiers of scikit-learn, LightGBM and XGBoost, whose own exporters write them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import onnx
import torch
from architectures import ARCHITECTURES, BATCH, TOKENS, Architecture, Outputs, declare_operators, quiet
from torch import Tensor, nn

# Extents of dynamic dimensions other than those that a model is written and calibrated with.
OTHER = {BATCH: 3, TOKENS: 11}
AUTHOR = ("author", "breadth")
NEWEST_OPSET = 23  # that torch's exporter writes


class NotMade(Exception):  # noqa: N818  an outcome: the producer does not write this model
    """The producer refuses the model, so that there is no file to load."""


class Detector(nn.Module):
    """Boxes, labels and scores of the one image of a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.model([image[0]])[0]
        return found["boxes"], found["labels"], found["scores"]


class Named(nn.Module):
    """A transformers model that takes its inputs by name, and gives one tensor of its outputs."""

    def __init__(self, model: nn.Module, names: Sequence[str], key: str, **options: Any) -> None:
        super().__init__()
        self.model, self.names, self.key, self.options = model, tuple(names), key, options

    def forward(self, *values: Tensor) -> Tensor:
        found: Tensor = self.model(**dict(zip(self.names, values, strict=True)), **self.options)[self.key]
        return found


class WithCache(nn.Module):
    """A decoder of one layer's keys and values: logits and the grown cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.update(keys, values, 0)
        found = self.model(ids, past_key_values=cache, use_cache=True)
        return found.logits, cache.layers[0].keys, cache.layers[0].values


class GraphNetwork(nn.Module):
    """Two rounds of messages along edges [2, E] between nodes [N, F]: gather, sum by scattering, product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 7)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            sent = layer(nodes)
            target = edges[1][:, None].expand(-1, sent.shape[1])
            nodes = torch.relu(sent + torch.zeros_like(sent).scatter_add(0, target, sent[edges[0]]))
        found: Tensor = self.head(nodes)
        return found


class Recommender(nn.Module):
    """DLRM in small: tables of embeddings, a bottom net, dot products of all pairs, a top net."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(100, 16) for _ in range(4))
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 25, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        low = self.bottom(dense)
        looked_up = [table(ids[:, index]) for index, table in enumerate(self.tables)]
        vectors = torch.stack([low, *looked_up], 1)
        pairs = vectors @ vectors.transpose(1, 2)
        found: Tensor = self.top(torch.cat([low, pairs.flatten(1)], 1))
        return found


class Denoiser(nn.Module):
    """A diffusion step: a UNet of one level, told the time by sines."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32))
        self.enter, self.down = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.norm, self.attend = nn.GroupNorm(8, 32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.leave = nn.Conv2d(64, 4, 3, padding=1)

    def forward(self, noisy: Tensor, step: Tensor) -> Tensor:
        angles = step[:, None] * torch.exp(-torch.arange(16) / 4.0)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        high = self.enter(noisy)
        low = self.down(torch.nn.functional.silu(self.norm(high) + time[:, :, None, None]))
        flat = low.flatten(2).transpose(1, 2)
        flat = flat + self.attend(flat, flat, flat, need_weights=False)[0]
        low = flat.transpose(1, 2).reshape(low.shape)
        up = torch.nn.functional.interpolate(low, scale_factor=2.0)
        found: Tensor = self.leave(torch.cat([high, up], 1))
        return found


def _torchvision(name: str, **options: Any) -> nn.Module:
    declare_operators()
    import torchvision

    module: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None, **options)
    return module


def _speech() -> nn.Module:
    import transformers as t

    config = t.WhisperConfig(
        vocab_size=200, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=50,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        attn_implementation="eager",
    )  # fmt: skip
    model = t.WhisperForConditionalGeneration(config)
    return Named(model, ("input_features", "decoder_input_ids"), "logits", use_cache=False)


def _t5() -> nn.Module:
    import transformers as t

    config = t.T5Config(
        vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return Named(t.T5ForConditionalGeneration(config), ("input_ids", "decoder_input_ids"), "logits", use_cache=False)


def _clip() -> nn.Module:
    import transformers as t

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = t.CLIPConfig(
        text_config={"vocab_size": 200, "max_position_embeddings": 16, "eos_token_id": 2, **small},
        vision_config={"image_size": 32, "patch_size": 8, **small},
        projection_dim=32,
        attn_implementation="eager",
    )
    return Named(t.CLIPModel(config), ("input_ids", "pixel_values"), "logits_per_image")


def _mamba() -> nn.Module:
    import transformers as t

    config = t.MambaConfig(vocab_size=200, hidden_size=64, state_size=8, num_hidden_layers=1)
    return Outputs(t.MambaForCausalLM(config), "logits", use_cache=False)


def _decoder() -> nn.Module:
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    return WithCache(t.LlamaForCausalLM(config))


def _wave() -> nn.Module:
    import transformers as t

    config = t.Wav2Vec2Config(
        vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128,
        conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, attn_implementation="eager",
    )  # fmt: skip
    return Named(t.Wav2Vec2ForCTC(config), ("input_values",), "logits")


def _segformer() -> nn.Module:
    import transformers as t

    config = t.SegformerConfig(hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], decoder_hidden_size=64)
    return Named(t.SegformerForSemanticSegmentation(config), ("pixel_values",), "logits")


def _ids(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(3, 100, shape)


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def _edges() -> Tensor:
    return torch.randint(0, 20, (2, 60))


_DETECTORS = {
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0, "detections_per_img": 10, "topk_candidates": 20},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"box_score_thresh": 0.0, "box_detections_per_img": 10},
    "retinanet_resnet50_fpn": {"score_thresh": 0.0, "detections_per_img": 10, "topk_candidates": 20},
}
_SEGMENTERS = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50")


def _segmenter(name: str) -> nn.Module:
    return Outputs(_torchvision(name, num_classes=5), "out")


def _more() -> tuple[Architecture, ...]:
    own: dict[str, Mapping[int, str]] = {}
    detectors = (
        Architecture(
            name,
            "torchvision",
            lambda name=name, options=options: Detector(_torchvision(name, num_classes=5, **options)),
            {"image": _numbers(1, 3, 96, 96)},
            own,
        )
        for name, options in _DETECTORS.items()
    )
    segmenters = (
        Architecture(
            name,
            "torchvision",
            lambda name=name: _segmenter(name),
            {"image": _numbers(2, 3, 64, 64)},
            {"image": {0: BATCH}},
        )
        for name in _SEGMENTERS
    )
    tokens = {0: BATCH, 1: TOKENS}
    return (
        *detectors,
        *segmenters,
        Architecture(
            "whisper",
            "transformers",
            _speech,
            {"features": _numbers(2, 80, 100), "ids": _ids(2, 16)},
            {"features": {0: BATCH}, "ids": tokens},
        ),
        Architecture(
            "t5",
            "transformers",
            _t5,
            {"ids": _ids(2, 16), "decoder_ids": _ids(2, 16)},
            {"ids": tokens, "decoder_ids": {0: BATCH}},
        ),
        Architecture("clip", "transformers", _clip, {"ids": _ids(2, 16), "pixels": _numbers(2, 3, 32, 32)}, own),
        Architecture("mamba", "transformers", _mamba, {"ids": _ids(2, 16)}, {"ids": {0: BATCH}}),
        Architecture(
            "llama_cache",
            "transformers",
            _decoder,
            {"ids": _ids(1, 1), "keys": _numbers(1, 2, 16, 16), "values": _numbers(1, 2, 16, 16)},
            {"keys": {2: TOKENS}, "values": {2: TOKENS}},
        ),
        Architecture("wav2vec2", "transformers", _wave, {"signal": _numbers(2, 1000)}, {"signal": {0: BATCH}}),
        Architecture("segformer", "transformers", _segformer, {"image": _numbers(2, 3, 64, 64)}, {"image": {0: BATCH}}),
        Architecture("graph", "own", GraphNetwork, {"nodes": _numbers(20, 16), "edges": _edges}, own),
        Architecture(
            "dlrm",
            "own",
            Recommender,
            {"dense": _numbers(2, 13), "sparse": _ids(2, 4)},
            {"dense": {0: BATCH}, "sparse": {0: BATCH}},
        ),
        Architecture(
            "diffusion",
            "own",
            Denoiser,
            {"noisy": _numbers(2, 4, 16, 16), "step": lambda: torch.rand(2)},
            {"noisy": {0: BATCH}, "step": {0: BATCH}},
        ),
    )


NETWORKS: Mapping[str, Architecture] = {one.name: one for one in (*ARCHITECTURES.values(), *_more())}


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
    architecture = NETWORKS[name]
    declare_operators()  # transformers imports torchvision where it is installed
    with quiet():
        module, inputs = architectures.make(architecture)
        keeps = producer in _DYNAMIC and bool(architecture.dynamic)
        feeds = [inputs, *([_resized(inputs, architecture)] if keeps else [])]
        with torch.no_grad():
            expected = tuple(_flat(module(*feed.values())) for feed in feeds)
        try:
            path = _PRODUCERS[producer](module, inputs, architecture, folder)
        except Exception as error:
            raise NotMade(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    told = producer in _TOLD
    specs = tuple(_spec(key, tensor, architecture) for key, tensor in inputs.items()) if told else ()
    arrays = tuple({key: tensor.numpy() for key, tensor in feed.items()} for feed in feeds)
    return Made(path, specs, arrays, expected, keeps)


def _flat(found: Any) -> tuple[np.ndarray, ...]:
    return tuple(tensor.numpy() for tensor in (found if isinstance(found, tuple) else (found,)))


def _resized(inputs: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The inputs with other extents, cut or repeated."""
    resized = {}
    for name, tensor in inputs.items():
        for axis, dim in architecture.dynamic.get(name, {}).items():
            tensor = tensor.index_select(axis, torch.arange(OTHER[dim]) % tensor.shape[axis])  # noqa: PLW2901
        resized[name] = tensor
    return resized


def _spec(name: str, tensor: Tensor, architecture: Architecture) -> str:
    dynamic = architecture.dynamic.get(name, {})
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


def cells() -> list[tuple[str, str]]:
    """Every model with every producer that may write it."""
    return [
        *((name, producer) for name in NETWORKS for producer in PRODUCERS),
        *((name, "onnx") for name in CLASSIFIERS),
    ]
