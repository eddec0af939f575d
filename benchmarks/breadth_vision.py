"""Networks on images for `breadth`: the published architectures with few layers and few channels."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import own_networks
import torch
from architectures import BATCH, Architecture
from modelpress_compression.loaders import vision_ops
from torch import Tensor, nn

_IMAGE = {"image": {0: BATCH}}
_FEW: dict[str, Any] = {"num_classes": 10}


class Detector(nn.Module):
    """The named findings for the one image of a batch."""

    def __init__(self, model: nn.Module, keys: Sequence[str] = ("boxes", "labels", "scores")) -> None:
        super().__init__()
        self.model, self.keys = model, tuple(keys)

    def forward(self, image: Tensor) -> list[Tensor]:
        found = self.model([image[0]])
        detections = found[1] if torch.jit.is_scripting() else found  # the losses come first there
        return [detections[0][key] for key in self.keys]


class Segmenter(nn.Module):
    """The classes of every pixel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.model(image)["out"]
        return found


class Inceptions(nn.Module):
    """Two of GoogLeNet's blocks behind a stem."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.googlenet import BasicConv2d, Inception

        self.stem = BasicConv2d(3, 16, kernel_size=3, stride=2)
        self.blocks = nn.Sequential(Inception(16, 8, 8, 16, 4, 8, 8), Inception(40, 16, 8, 16, 4, 8, 8))
        self.head = nn.Linear(48, 10)

    def forward(self, image: Tensor) -> Tensor:
        head: Tensor = self.head(self.blocks(self.stem(image)).mean([2, 3]))
        return head


@functools.cache
def vision_library() -> torch.library.Library:
    """torchvision's detectors run on its operators as the loaders define them, which last as long as the cache's value.

    Its wheels are built for CUDA: beside torch for CPU it does not import without.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    vision_ops.define(library)
    library.impl("roi_align", _roi_align_shape, "Meta")
    importlib.import_module("torchvision")
    for name in ("torchvision.extension", "torchvision.ops.roi_align"):
        sys.modules[name]._has_ops = _has_ops  # type: ignore[attr-defined]
    return library


def _has_ops() -> bool:
    return True


def _roi_align_shape(
    features: Tensor, rois: Tensor, scale: float, height: int, width: int, sampling: int, aligned: bool
) -> Tensor:
    return features.new_empty(rois.shape[0], features.shape[1], height, width)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        vision_library()  # timm imports torchvision
        import timm

        module: nn.Module = timm.create_model(name, pretrained=False, exportable=True, **_FEW | options)
        return module

    return build


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=48, **_FEW)


def _swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), **_FEW
    )


def _regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    params = BlockParams.from_init_params(depth=4, w_0=16, w_a=16.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return RegNet(params, stem_width=16, **_FEW)


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import MobileNetV2

    setting = [[1, 16, 1, 1], [4, 24, 2, 2], [4, 32, 1, 2]]
    return MobileNetV2(inverted_residual_setting=setting, width_mult=0.5, **_FEW)


def _mobilenet_v3() -> nn.Module:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    rows = ((16, 3, 16, 16, True, "RE", 2), (16, 3, 40, 24, False, "RE", 1), (24, 5, 64, 24, True, "HS", 2))
    return MobileNetV3([InvertedResidualConfig(*row, 1, 1) for row in rows], 64, **_FEW)


def _shufflenet() -> nn.Module:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([2, 2, 2], [16, 16, 32, 48, 64], **_FEW)


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, **_FEW)


def _squeezenet() -> nn.Module:
    from torchvision.models.squeezenet import Fire

    layers = (nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(16, 8, 16, 16))
    return nn.Sequential(*layers, Fire(32, 8, 16, 16), nn.Conv2d(32, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _pyramid() -> nn.Module:
    """A pyramid of 16 channels over a ResNet of four layers."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    body = _timm("resnet18", **_NARROW)()
    layers = {"layer3": "0", "layer4": "1"}
    return BackboneWithFPN(body, layers, in_channels_list=[24, 32], out_channels=16)


_SIDES = {"min_size": 64, "max_size": 64, "num_classes": 5}


def _anchors() -> nn.Module:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(sizes=((16,), (32,), (48,)), aspect_ratios=((0.5, 1.0, 2.0),) * 3)


_SPREAD = 10.0
_FOUND = {"box_score_thresh": 0.0, "box_detections_per_img": 5, "rpn_post_nms_top_n_test": 20, **_SIDES}


def _two_stages(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import detection as d
        from torchvision.models.detection.faster_rcnn import TwoMLPHead

        options = {"rpn_anchor_generator": _anchors(), "box_head": TwoMLPHead(16 * 49, 32), **_FOUND}
        options |= {"num_classes": None, "box_predictor": d.faster_rcnn.FastRCNNPredictor(32, 5)}
        if kind == "mask":
            head = d.mask_rcnn.MaskRCNNHeads(16, (16,), 1)
            predictor = d.mask_rcnn.MaskRCNNPredictor(16, 16, 5)
            return Detector(
                d.MaskRCNN(_pyramid(), mask_head=head, mask_predictor=predictor, **options),
                ("boxes", "labels", "scores", "masks"),
            )
        if kind == "keypoint":
            heads = d.keypoint_rcnn.KeypointRCNNHeads(16, (16,))
            points = d.keypoint_rcnn.KeypointRCNNPredictor(16, 3)
            return Detector(
                d.KeypointRCNN(_pyramid(), keypoint_head=heads, keypoint_predictor=points, **options),
                ("boxes", "scores", "keypoints"),
            )
        return Detector(d.FasterRCNN(_pyramid(), **options))

    return build


def _retinanet() -> nn.Module:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    anchors = AnchorGenerator(sizes=((16,), (32,), (48,)), aspect_ratios=((0.5, 1.0),) * 3)
    few = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 10}
    return Detector(RetinaNet(_pyramid(), anchor_generator=anchors, **few, **_SIDES))


def _ssdlite() -> nn.Module:
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead

    body = _pyramid()
    anchors = DefaultBoxGenerator([[2]] * 3, min_ratio=0.2, max_ratio=0.9)
    head = SSDLiteHead([16] * 3, anchors.num_anchors_per_location(), 5, nn.BatchNorm2d)
    few = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 10}
    return Detector(SSD(body, anchors, (96, 96), 5, head=head, **few))


def _segmenter(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import segmentation as s
        from torchvision.models._utils import IntermediateLayerGetter

        body = _timm("resnet18", **_NARROW)()
        layers = {"layer2": "low", "layer4": "high"} if kind == "lraspp" else {"layer4": "out"}
        backbone = IntermediateLayerGetter(body, layers)
        if kind == "lraspp":
            return Segmenter(s.LRASPP(backbone, 16, 32, num_classes=5, inter_channels=16))
        if kind == "fcn":
            return Segmenter(s.FCN(backbone, s.fcn.FCNHead(32, 5)))
        return Segmenter(s.DeepLabV3(backbone, s.deeplabv3.DeepLabHead(32, 5, (2, 4, 6))))

    return build


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


@torch.no_grad()
def _decided(detector: Detector) -> Detector:
    """With scores that lie apart: those of a network as it is drawn differ so little that rounding ranks its boxes."""
    for name, parameter in detector.named_parameters():
        if name.endswith("weight") and any(part in name for part in ("cls_logits", "cls_score", "classification_head")):
            parameter.mul_(_SPREAD)
    return detector


def _with_torchvision(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def first_declared() -> nn.Module:
        vision_library()
        module = build()
        return _decided(module) if isinstance(module, Detector) else module

    return first_declared


def _vision(name: str, source: str, build: Callable[[], nn.Module], size: int = 32) -> Architecture:
    inputs = {"image": lambda: torch.randn(2, 3, size, size)}
    return Architecture(name, source, _with_torchvision(build), inputs, _IMAGE)


def _detector(name: str, build: Callable[[], nn.Module]) -> Architecture:
    fixed: Mapping[str, Mapping[int, str]] = {}
    inputs = {"image": lambda: torch.randn(1, 3, 64, 64)}
    return Architecture(name, "torchvision", _with_torchvision(build), inputs, fixed)


def _own(name: str, build: Callable[[], nn.Module], *shape: int) -> Architecture:
    return Architecture(name, "own", build, {"image": lambda: torch.randn(2, *shape)}, _IMAGE)


_NARROW = {"layers": (1, 1, 1, 1), "channels": (16, 16, 24, 32)}
_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
NETWORKS = (
    _vision("resnet", "timm", _timm("resnet18", **_NARROW)),
    _vision("resnext", "timm", _timm("resnext50_32x4d", cardinality=4, base_width=16, **_NARROW)),
    _vision("efficientnet", "timm", _timm("test_efficientnet")),
    _vision("convnext", "timm", _timm("test_convnext", depths=(1, 1, 1, 1), dims=(16, 16, 24, 32))),
    _vision("nfnet", "timm", _timm("test_nfnet")),
    _vision("mambaout", "timm", _timm("test_mambaout")),
    _vision("repvgg", "timm", _timm("test_byobnet")),
    _vision("vit", "timm", _timm("vit_tiny_patch16_224", **_VIT)),
    _vision("deit", "timm", _timm("deit_tiny_distilled_patch16_224", **_VIT)),
    _vision("mixer", "timm", _mixer),
    _vision("swin", "timm", _swin),
    _vision("mobilenet_v2", "torchvision", _mobilenet_v2),
    _vision("mobilenet_v3", "torchvision", _mobilenet_v3),
    _vision("regnet", "torchvision", _regnet),
    _vision("densenet", "torchvision", _densenet),
    _vision("shufflenet", "torchvision", _shufflenet),
    _vision("squeezenet", "torchvision", _squeezenet),
    _vision("googlenet", "torchvision", Inceptions),
    _vision("fcn", "torchvision", _segmenter("fcn"), 64),
    _vision("deeplabv3", "torchvision", _segmenter("deeplabv3"), 64),
    _vision("lraspp", "torchvision", _segmenter("lraspp"), 64),
    _detector("ssdlite", _ssdlite),
    _detector("retinanet", _retinanet),
    _detector("faster_rcnn", _two_stages("faster")),
    _detector("mask_rcnn", _two_stages("mask")),
    _detector("keypoint_rcnn", _two_stages("keypoint")),
    _own("unet", lambda: own_networks.UNet(width=8), 3, 32, 32),
    _own("pixel_shuffle", lambda: own_networks.PixelShuffleNet(16, 1), 3, 16, 16),
    Architecture(
        "diffusion",
        "own",
        Denoiser,
        {"noisy": lambda: torch.randn(2, 4, 16, 16), "step": lambda: torch.rand(2)},
        {"noisy": {0: BATCH}, "step": {0: BATCH}},
    ),
)
