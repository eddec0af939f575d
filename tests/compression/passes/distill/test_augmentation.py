"""Each augmentation: shapes, ranges, determinism, and what it does to known inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import PassResult
from modelpress_compression.passes.distill import teacher, training
from modelpress_compression.passes.distill.augmentation import Augmenter, make_augmenter, transforms
from modelpress_compression.passes.distill.augmentation.kinds import InputKind, input_kinds
from modelpress_compression.passes.distill.config import AUGMENTATIONS, Augmentation
from onnx import helper

OF_IMAGES = ("horizontal_flip", "vertical_flip", "rotation", "random_resized_crop", "color_jitter", "noise", "mixup")
AMOUNTS = {option.name: option.default for option in AUGMENTATIONS.options}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pictures() -> torch.Tensor:
    """Images in [-2, 3], as normalization leaves them."""
    return torch.rand(16, 3, 12, 10, generator=generator(5)) * 5 - 2


@pytest.mark.parametrize("name", OF_IMAGES)
def test_images_keep_shape_and_range(name: str, pictures: torch.Tensor) -> None:
    """Shape and type stay, and no value leaves the range of the batch (to 1e-5)."""
    changed = getattr(transforms, name)(pictures, AMOUNTS[name], generator())
    assert changed.shape == pictures.shape
    assert changed.dtype == pictures.dtype
    assert not torch.equal(changed, pictures)
    assert float(changed.min()) >= float(pictures.min()) - 1e-5
    assert float(changed.max()) <= float(pictures.max()) + 1e-5


@pytest.mark.parametrize("name", OF_IMAGES)
def test_images_depend_on_the_seed_alone(name: str, pictures: torch.Tensor) -> None:
    """One seed, one result; another seed, another result."""
    apply, amount = getattr(transforms, name), AMOUNTS[name]
    assert torch.equal(apply(pictures, amount, generator(1)), apply(pictures, amount, generator(1)))
    assert not torch.equal(apply(pictures, amount, generator(1)), apply(pictures, amount, generator(2)))


def test_flips_mirror(pictures: torch.Tensor) -> None:
    """With probability 1 every image is mirrored along its axis, and twice gives it back."""
    assert torch.equal(transforms.horizontal_flip(pictures, 1.0, generator()), pictures.flip(3))
    assert torch.equal(transforms.vertical_flip(pictures, 1.0, generator()), pictures.flip(2))


def test_rotation_turns_without_squeezing() -> None:
    """A disc in the middle of an oblong image stays the disc that it was (to 0.2 of its height), whatever the angle."""
    y, x = torch.meshgrid(torch.arange(21.0) - 10, torch.arange(41.0) - 20, indexing="ij")
    disc = torch.exp(-(x**2 + y**2) / 18)[None, None]
    turned = transforms.rotation(disc.repeat(8, 1, 1, 1), 180.0, generator())
    assert float((turned - disc).abs().max()) < 0.2


def test_rotation_moves_what_is_off_the_middle() -> None:
    """By up to 90 degrees, a bright spot to the right does not stay where it was."""
    spot = torch.zeros(1, 1, 21, 21)
    spot[..., 10, 18] = 1
    turned = transforms.rotation(spot.repeat(16, 1, 1, 1), 90.0, generator(3))
    assert float(turned[:, 0, 10, 18].mean()) < 0.5


def test_crop_shows_a_part() -> None:
    """Of a ramp a crop shows a part: the span never grows, and on average it shrinks as the sides of the crop do."""
    ramp = torch.arange(32.0).repeat(64, 1, 32, 1)
    changed = transforms.random_resized_crop(ramp, 0.25, generator())
    spans = changed.amax(dim=(1, 2, 3)) - changed.amin(dim=(1, 2, 3))
    assert float(spans.max()) <= 31
    assert 15 < float(spans.mean()) < 28


def test_mixup_blends_pairs() -> None:
    """A blend keeps at least half of its own image, and the mean over the batch stays in between."""
    batch = torch.eye(8).view(8, 1, 1, 8).repeat(1, 1, 4, 1)
    mixed = transforms.mixup(batch, 1.0, generator())
    own = mixed[torch.arange(8), 0, 0, torch.arange(8)]
    assert float(own.min()) >= 0.5
    assert torch.allclose(mixed.sum(3), torch.ones(8, 1, 4))


def test_gamma_variates_have_their_moments() -> None:
    """Mean and variance of gamma variates are their shape (to 5 %), also below 1."""
    for shape in (0.2, 1.0, 4.0):
        drawn = transforms._gamma(shape, 100_000, generator())
        assert float(drawn.mean()) == pytest.approx(shape, rel=0.05)
        assert float(drawn.var()) == pytest.approx(shape, rel=0.08)


@pytest.mark.parametrize("axis", [-1, 1])
def test_time_masking_silences_one_stretch(axis: int) -> None:
    """What changes is one run of neighbours of at most the share of the time, and is the sample's mean there."""
    signals = torch.randn(8, 100, 6, generator=generator(1))
    signals = signals if axis == 1 else signals.transpose(1, 2)
    changed = transforms.time_masking(signals, 0.3, generator(), axis)
    different = (changed != signals).movedim(axis, 1).reshape(8, 100, -1).all(-1)
    for index, row in enumerate(different):
        places = row.nonzero().ravel()
        assert len(places) <= 31
        assert (places.diff() == 1).all()
        hidden = changed[index].movedim(axis - 1 if axis > 0 else axis, 0)[places]
        assert torch.equal(hidden, signals[index].mean().expand_as(hidden))
    assert different.any()


def test_token_masking_respects_padding_and_the_first_token() -> None:
    """About the share of counted tokens changes, into tokens that the batch has; padding and first tokens stay."""
    tokens = torch.randint(5, 1000, (64, 20), generator=generator(1))
    counted = torch.arange(20).repeat(64, 1) < 15
    tokens[~counted] = 0
    changed = transforms.token_masking(tokens, 0.5, generator(), counted)
    assert torch.equal(changed[~counted], tokens[~counted])
    assert torch.equal(changed[:, 0], tokens[:, 0])
    share = float((changed != tokens)[counted].float().mean())
    assert 0.35 < share < 0.55
    assert set(changed[counted].tolist()) <= set(tokens[counted].tolist())


def test_bytes_stay_bytes_and_channels_stay_last(channel_model: Callable[..., Model]) -> None:
    """uint8 images with their channels last come back as such."""
    array = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
    change = Augmenter([_change("x", "image", 3, "horizontal_flip", 1.0)], 0, dense_labels=False)
    changed, keeps_labels = change({"x": array})
    np.testing.assert_array_equal(changed["x"], array[:, :, ::-1])
    assert changed["x"].dtype == np.uint8
    assert keeps_labels


def _change(name: str, kind: str, axis: int, augmentation: str, amount: float) -> Any:
    from modelpress_compression.passes.distill.augmentation import _Change

    return _Change(InputKind(name, kind, axis), Augmentation(augmentation, amount))


def test_what_fits_no_input_is_left_out(
    conv_net: Model, images: Any, perturbed: Any, distill: Callable[..., PassResult]
) -> None:
    """Token masking of images is not done, and the warning says what it is for and what the inputs are."""
    augment = (Augmentation("token_masking", 0.1), Augmentation("noise", 0.05))
    result = distill(conv_net, perturbed(conv_net), {"x": images(32)}, epochs=2, augment=augment)
    (warning,) = [warning for warning in result.warnings if "augmentation" in warning]
    assert "'token_masking' was left out: it changes token indices; the model's inputs are 'x' (images)" in warning


def test_both_models_see_the_same(
    conv_net: Model, images: Any, perturbed: Any, distill: Callable[..., PassResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every batch, teacher and student get the same changed inputs."""
    seen: dict[str, list[Any]] = {"teacher": [], "student": []}
    changed, forward = teacher.Teacher.uncached, training.Executor.forward

    def watch_teacher(self: Any, inputs: Any) -> Any:
        seen["teacher"].append(inputs["x"].copy())
        return changed(self, inputs)

    def watch_student(self: Any, inputs: Any) -> Any:
        if torch.is_grad_enabled():
            seen["student"].append(inputs["x"].copy())
        return forward(self, inputs)

    monkeypatch.setattr(teacher.Teacher, "uncached", watch_teacher)
    monkeypatch.setattr(training.Executor, "forward", watch_student)
    arrays = images(32)
    distill(conv_net, perturbed(conv_net), {"x": arrays}, epochs=2, augment=(Augmentation("rotation", 15),))
    assert len(seen["teacher"]) == len(seen["student"]) > 0
    for theirs, mine in zip(seen["teacher"], seen["student"], strict=True):
        np.testing.assert_array_equal(theirs, mine)
    assert not any((batch == arrays[i : i + 1]).all() for batch in seen["student"] for i in range(32))


def test_mixup_leaves_labels_out(conv_net: Model, images: Any) -> None:
    """Blended images have no label of their own; labels of positions do not outlive a turn."""
    data = InputData.from_arrays({"x": images(8), "labels": np.zeros(8, np.int64)}, conv_net.inputs)
    dense = InputData.from_arrays({"x": images(8), "labels": np.zeros((8, 4), np.int64)}, conv_net.inputs)
    cases = [(data, "mixup", False), (data, "rotation", True), (dense, "rotation", False), (dense, "noise", True)]
    for given, name, holds in cases:
        augmenter, _ = make_augmenter(conv_net, given, [Augmentation(name, 0.2)], 0)
        assert augmenter is not None
        assert augmenter({"x": images(8)})[1] is holds


def test_kinds_of_inputs(conv_net: Model, images: Any, channel_model: Callable[..., Model]) -> None:
    """Four axes with few channels are images; two float axes a signal; states are neither."""
    data = InputData.from_arrays({"x": images(2)}, conv_net.inputs)
    assert input_kinds(conv_net, data) == [InputKind("x", "image", 1)]
    flat = channel_model([helper.make_node("Relu", ["x"], ["y"])], {}, ["n", 400], ["n", 400])
    waves = InputData.from_arrays({"x": np.zeros((2, 400), np.float32)}, flat.inputs)
    assert input_kinds(flat, waves) == [InputKind("x", "signal", -1)]
    flat.graph.inputs[0].name = "state"
    state = InputData.from_arrays({"state": np.zeros((2, 400), np.float32)}, flat.inputs)
    assert input_kinds(flat, state) == [InputKind("state", "other", -1)]
