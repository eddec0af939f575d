"""Weights go into their network whole, or not at all; what was chosen and what was left out is said."""

from __future__ import annotations

import argparse
import contextlib
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelpress_compression.errors import InvalidInputsError, RejectedModelError, UnsupportedFormatError
from modelpress_compression.loaders.checkpoint_file import StoredArray, read_pickle
from modelpress_compression.loaders.weight_loading import load_checkpoint
from torch import nn
from torch.nn.utils import parametrizations, prune

Weights = Mapping[str, torch.Tensor]


class Net(nn.Module):
    """Layers of a few kinds, and a stack of them."""

    def __init__(self, depth: int = 2, classes: int = 3, *, head: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(depth))
        self.head = nn.Linear(6, classes) if head else nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        """[batch, 4] -> [batch, classes]."""
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.output = nn.Linear(4, 8, bias=False)
        self.output.weight = self.embedding.weight


class Parts(nn.Module):
    """Two parts that are saved apart."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)


def weights_of(seed: int, **options: Any) -> Weights:
    """Random weights of `Net`."""
    torch.manual_seed(seed)
    return {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in Net(**options).state_dict().items()
    }


def prefixed(weights: Weights, prefix: str) -> dict[str, torch.Tensor]:
    """The same weights by longer names."""
    return {f"{prefix}{name}": value for name, value in weights.items()}


def loaded(module: nn.Module, checkpoint: object, **options: Any) -> tuple[Weights, list[str]]:
    """The network's weights afterwards, and the notes."""
    filled, notes = load_checkpoint(module, checkpoint, **options)
    return filled.state_dict(), notes


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


A, B, ADAM = weights_of(1), weights_of(2), torch.optim.Adam(Net().parameters()).state_dict()


@pytest.mark.parametrize(
    "checkpoint",
    [
        A,
        {"state_dict": A, "epoch": 3, "optimizer": ADAM},
        {"generator": A, "discriminator": {"conv.weight": torch.ones(3)}},
        {"netG": A, "netD": weights_of(3, classes=1)},
        {"models": [{"deep": {"er": A}}]},
        {"module": A, "ds_version": "0.15"},
        {"params": A, "state_dict": dict(A)},
        prefixed(A, "module._orig_mod."),
        prefixed(A, "any.thing.at.all."),
        {name.replace("blocks.", "_fsdp_wrapped_module.blocks.module."): value for name, value in A.items()},
        {"state_dict": {**prefixed(A, "model."), "loss.weight": torch.ones(2), "val_acc.tp": torch.ones(3)}},
        {"state_dict": {**A, "loss.weight": torch.ones(2), "train_metrics.f1.tp": torch.ones(3)}},
        {**prefixed(A, "module."), "n_averaged": torch.tensor(4)},
        {name: value for name, value in A.items() if "num_batches_tracked" not in name},
        {name: value.reshape(-1) if value.ndim == 0 else value for name, value in A.items()},
        {**A, "total_ops": torch.zeros(1), "stem.total_params": torch.zeros(1)},
    ],
)
def test_places_and_names(checkpoint: object) -> None:
    """The weights are found wherever they lie, and whatever wrappers made of their names."""
    got, _ = loaded(Net(), checkpoint)
    assert all(torch.equal(got[name], value) for name, value in A.items() if value.is_floating_point())


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [("params", "params_ema"), ("state_dict", "state_dict_ema"), ("model", "model_ema"), ("G", "G_ema"),
     ("g", "g_ema"), ("student", "teacher"), ("model", "ema"), ("net", "swa_model")],
)  # fmt: skip
def test_averaged_weights_go_first(plain: str, averaged: str) -> None:
    """That is said, with the key that refuses them; the key is obeyed."""
    checkpoint = {plain: A, averaged: B}
    got, notes = loaded(Net(), checkpoint)
    assert same(got, B)
    assert f"averaged weights (EMA) in {averaged!r}; --state-dict-key {plain} " in notes[0]
    got, notes = loaded(Net(), checkpoint, key=plain)
    assert same(got, A)
    assert not notes


def test_averaged_weights_by_prefix() -> None:
    """Both sets among the names of one state dict."""
    checkpoint = {"state_dict": {**prefixed(A, "model."), **prefixed(B, "ema_model.")}}
    got, notes = loaded(Net(), checkpoint)
    assert same(got, B)
    assert len(notes) == 1
    assert same(loaded(Net(), checkpoint, key="state_dict.model")[0], A)
    assert same(loaded(Net(), checkpoint, key="model")[0], A)


def test_averaged_weights_that_do_not_fit() -> None:
    """The others are taken, and that is said."""
    got, notes = loaded(Net(), {"model": A, "ema": {"decay": torch.ones(1)}})
    assert same(got, A)
    assert "those in 'ema' do not fit" in notes[0]


@pytest.mark.parametrize(
    "checkpoint",
    [{"netG_A": A, "netG_B": B}, {**prefixed(A, "encoder_q."), **prefixed(B, "encoder_k.")}, {"ema": A, "swa": B}],
)
def test_two_that_fit(checkpoint: object) -> None:
    """Nothing is taken at random."""
    with pytest.raises(InvalidInputsError, match=r"2 different sets of weights that fit.*--state-dict-key"):
        load_checkpoint(Net(), checkpoint)


def test_keys_behind_wrappers() -> None:
    """A set among the names of one state dict is named without what a wrapper put before all of them, and offered with
    its whole path."""
    checkpoint = {"state_dict": {**prefixed(A, "module.encoder_q."), **prefixed(B, "module.encoder_k.")}, "epoch": 1}
    assert same(loaded(Net(), checkpoint, key="encoder_q")[0], A)
    assert same(loaded(Net(), checkpoint, key="state_dict.encoder_k")[0], B)
    with pytest.raises(InvalidInputsError, match=r"state_dict.module.encoder_q \(185 parameters\), .*encoder_k"):
        load_checkpoint(Net(), checkpoint, key="encoder")


def test_averages_of_lightning() -> None:
    """Its callback puts the averaged weights where the others were, and those beside them."""
    checkpoint = {
        "state_dict": prefixed(B, "net."), "current_model_state": prefixed(A, "net."),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }  # fmt: skip
    got, notes = loaded(Net(), checkpoint)
    assert same(got, B)
    assert "averaged weights (EMA) in 'state_dict.net'; --state-dict-key current_model_state.net" in notes[0]
    assert same(loaded(Net(), checkpoint, key="current_model_state")[0], A)


def test_averages_without_names() -> None:
    """They are the parameters in the network's order; buffers are those of the others. The key refuses them."""
    trained = Net()
    trained.load_state_dict(B)
    shadow = [value.detach().clone() for value in trained.parameters()]
    checkpoint = {"model": A, "ema": {"decay": 0.99, "shadow_params": shadow, "collected_params": None}}
    got, notes = loaded(Net(), checkpoint)
    parameters = dict(trained.named_parameters())
    assert all(torch.equal(value, (parameters if name in parameters else A)[name]) for name, value in got.items())
    assert "averaged weights (EMA) in 'ema.shadow_params'; --state-dict-key model takes" in notes[0]
    assert same(loaded(Net(), checkpoint, key="model")[0], A)
    got, notes = loaded(Net(), {"model": A, "ema": {"shadow_params": shadow[1:]}})
    assert same(got, A)
    assert "those in 'ema.shadow_params' do not fit" in notes[0]


def test_keys_that_are_not_there() -> None:
    """What there is is offered, with how many parameters it has."""
    with pytest.raises(InvalidInputsError, match=r"'nothing' is not in the file.*best.net \(185 parameters\)"):
        load_checkpoint(Net(), {"best": {"net": A}, "optimizer": ADAM}, key="nothing")


def test_parts_of_one_network() -> None:
    """Saved under one key each."""
    whole = Parts()
    got, _ = loaded(Parts(), {"encoder": whole.encoder.state_dict(), "decoder": whole.decoder.state_dict(), "step": 1})
    assert same(got, whole.state_dict())


def test_wrapping_modules() -> None:
    """A factory whose module holds the trained one."""
    got, _ = loaded(nn.ModuleDict({"net": Net()}), A)
    assert same(got, prefixed(A, "net."))


def test_heads_that_the_network_was_built_without() -> None:
    """They are left out, and named."""
    _, notes = loaded(Net(head=False), A)
    assert notes == ["Left out, for the network has no such part: head.weight, head.bias."]


@pytest.mark.parametrize(
    ("module", "weights", "said"),
    [
        (Net(depth=1), A, "not in the module: blocks.1.0.weight, blocks.1.0.bias"),
        (Net(depth=3), A, "missing in the file: blocks.2.0.weight"),
        (Net(classes=5), A, r"head.weight is \[3, 6\] in the file and \[5, 6\] in the module"),
        (Net(), weights_of(1, head=False), "missing in the file: head.weight, head.bias"),
        (Net(), {n: v for n, v in A.items() if "running_mean" not in n}, "in the file: blocks.0.1.running_mean"),
        (Net(), {**A, "norm.weight": torch.ones(3)}, r"--ignore-weights 'norm\.\*'"),
        (Net(), {**A, "cls_token": torch.ones(3)}, "not in the module: cls_token"),
        (Net(), {**A, "mask": torch.ones(3), "neck.a": torch.ones(3)}, r"'mask' --ignore-weights 'neck\.\*'"),
        (nn.Sequential(nn.Linear(4, 4)), nn.Sequential(*2 * [nn.Linear(4, 4)]).state_dict(), "not in the module: 1.w"),
        (Net(), {**A, "head.weight": torch.ones(3, 6, dtype=torch.int8)}, "head.weight is int8 in the file"),
        (Net(), {**A, "head.weight": torch.ones(3, 6, dtype=torch.int8), "head.SCB": torch.ones(3)}, "quantized a"),
        (Net(), {n: torch.empty(0) for n in A}, "zero_to_fp32.py"),
        (Net(), {"_flat_param": torch.ones(99)}, "FULL_STATE_DICT"),
        (Net(), {"stem.lora_A.weight": torch.ones(2, 4), "stem.lora_B.weight": torch.ones(4, 2)}, "merge_and_unload"),
        (Tied(), {"embedding.weight": torch.ones(8, 4), "output.weight": torch.zeros(8, 4)}, "output.weight and embed"),
    ],
)  # fmt: skip
def test_misfits(module: nn.Module, weights: Weights, said: str) -> None:
    """Weights that belong to another network are refused: what does not fit, and what to do. Nothing is put in."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(InvalidInputsError, match=said):
        load_checkpoint(module, weights)
    assert same(before, module.state_dict())


def test_layers_of_a_stack_are_not_to_be_ignored() -> None:
    """What would make another network of it is not offered."""
    with pytest.raises(InvalidInputsError) as caught:
        load_checkpoint(Net(depth=1), A)
    assert "--ignore-weights" not in caught.value.message


def test_many_misfits_are_counted() -> None:
    """A few names of each group, and how many there are."""
    with pytest.raises(InvalidInputsError, match=r"10 missing in the file: stem.weight, .* and 5 more; 40 not in") as e:
        load_checkpoint(Net(depth=1), {f"x{index}": torch.ones(1) for index in range(40)} | {})
    assert len(e.value.message) < 700


def test_weights_that_may_be_left_out() -> None:
    """By the user's word alone."""
    got, _ = loaded(Net(), {**A, "norm.weight": torch.ones(3)}, ignored=["norm.*"])
    assert same(got, A)


def test_tied_weights() -> None:
    """As Hugging Face saves them: one name of each is left out, or both are the same."""
    weight = torch.randn(8, 4)
    for weights in ({"embedding.weight": weight}, {"output.weight": weight, "embedding.weight": weight.clone()}):
        got, notes = loaded(Tied(), weights)
        assert torch.equal(got["output.weight"], weight)
        assert torch.equal(got["embedding.weight"], weight)
        assert not notes


def test_weights_of_lower_precision() -> None:
    """float16 and bfloat16 become the network's float32."""
    for dtype in (torch.float16, torch.bfloat16):
        lower = {name: value.to(dtype) if value.is_floating_point() else value for name, value in A.items()}
        got, _ = loaded(Net(), lower)
        assert torch.equal(got["head.weight"], lower["head.weight"].float())
        assert got["head.weight"].dtype == torch.float32


def old_names(weights: Weights) -> Weights:
    """As TensorFlow's checkpoints were converted."""
    return {
        name.replace("norm.weight", "norm.gamma").replace("norm.bias", "norm.beta"): value
        for name, value in weights.items()
    }


def test_gamma_and_beta() -> None:
    """Old names of normalization. A table of positions that the constructor computes may be missing; that is said."""
    module = nn.ModuleDict({"norm": nn.LayerNorm(3), "linear": nn.Linear(3, 3)})
    module.register_buffer("position_ids", torch.arange(5))
    weights = {name: torch.randn(value.shape) for name, value in module.state_dict().items() if name != "position_ids"}
    got, notes = loaded(module, old_names(weights))
    assert same({name: got[name] for name in weights}, weights)
    assert notes == ["Not in the file, computed by the network's own code: position_ids."]


def plain(module: nn.Module) -> nn.Module:
    return module


WEIGHT_NORMS = {"old": nn.utils.weight_norm, "new": parametrizations.weight_norm, "none": plain}
SPECTRAL_NORMS = {"old": nn.utils.spectral_norm, "new": parametrizations.spectral_norm, "none": plain}


@pytest.mark.parametrize(("source", "target"), [("old", "new"), ("new", "old"), ("old", "none"), ("new", "none")])
@pytest.mark.parametrize("norms", [WEIGHT_NORMS, SPECTRAL_NORMS], ids=["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized_weights(norms: dict[str, Callable[..., nn.Module]], source: str, target: str) -> None:
    """By the names of either generation of torch, and taken together where the network has them whole; rtol 1e-5."""

    def build(kind: str) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(norms[kind](nn.Conv1d(3, 4, 3)), norms[kind](nn.ConvTranspose1d(4, 2, 3)))

    trained = build(source).train()
    x = torch.randn(2, 3, 9)
    with torch.no_grad():
        for value in trained.parameters():
            value.mul_(1.5)
        for _ in range(3):
            trained(x)
    trained.eval()
    filled, _ = load_checkpoint(build(target), trained.state_dict())
    with torch.no_grad():
        np.testing.assert_allclose(filled.eval()(x), trained(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_of_one_channel() -> None:
    """Every axis of its lengths is 1, as in the last layer of a vocoder; rtol 1e-6."""
    normed, whole = nn.utils.weight_norm(nn.Conv1d(3, 1, 3)), nn.Conv1d(3, 1, 3)
    x = torch.randn(2, 3, 9)
    filled, _ = load_checkpoint(whole, {name: value * 1.5 for name, value in normed.state_dict().items()})
    normed.load_state_dict({name: value * 1.5 for name, value in normed.state_dict().items()})
    with torch.no_grad():
        np.testing.assert_allclose(filled(x), normed(x), rtol=1e-6, atol=1e-6)


def test_pruned_weights() -> None:
    """torch's pruning keeps a mask beside each weight; what the network computed with is their product."""
    module = Net()
    prune.l1_unstructured(module.stem, "weight", 0.5)
    prune.random_unstructured(module.head, "bias", 0.5)
    got, notes = loaded(Net(), prefixed(module.state_dict(), "module."))
    assert torch.equal(got["stem.weight"], module.stem.weight)
    assert torch.equal(got["head.bias"], module.head.bias)
    assert int((got["stem.weight"] == 0).sum()) == 12
    assert not notes


def test_files_without_weights() -> None:
    """The error names what was found instead; an optimizer's moments are no weights."""
    for checkpoint in ({"epoch": 1, "loss": 0.5}, {"optimizer": ADAM, "epoch": 1}, [], 3):
        with pytest.raises(UnsupportedFormatError, match="no weights of a network"):
            load_checkpoint(Net(), checkpoint)


class Settings(dict[str, int]):
    """A mapping of its own class, as Lightning keeps hyperparameters in."""


class Evil:
    """Runs code when it is read."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise AssertionError('the code in the file ran')",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_objects_are_not_made(tmp_path: Path, protocol: int, *, zipped: bool) -> None:
    """Whatever lies beside the weights, nothing of it is imported or called."""
    content = {
        "state_dict": OrderedDict(A), "args": argparse.Namespace(path=Path("/x"), evil=Evil()), "best": np.float64(0.5),
        "hyper_parameters": Settings(epochs=3), "counts": defaultdict(list, a=[1]),
        "parameter": nn.Parameter(torch.ones(2)),
        "callable": Evil(), "set": {1, 2}, "wide": torch.ones(2, dtype=torch.uint16 if zipped else torch.uint8),
    }  # fmt: skip
    path = tmp_path / "w.ckpt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    got, _ = loaded(Net(), read_pickle(path, trusted=False), key="state_dict")
    assert same(got, A)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_as_arrays(tmp_path: Path, *, zipped: bool, trusted: bool) -> None:
    """Of NumPy, as converters from other libraries write them; arrays of objects are no weights, and beside anything
    else arrays are none either."""
    arrays = {name: value.numpy() for name, value in A.items()}
    arrays["stem.weight"] = np.asfortranarray(arrays["stem.weight"]).astype(">f4")
    content = {"model": arrays, "author": "converter", "history": np.ones(3), "odd": np.array([Settings(), None])}
    path = tmp_path / "w.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    got, notes = loaded(Net(), read_pickle(path, trusted=trusted))
    assert same(got, A)
    assert not notes
    torch.save({"model": {"w": np.array([Evil(), None])}} if not trusted else {"loss": np.ones(3), "n": 1}, path)
    with pytest.raises(UnsupportedFormatError, match="no weights of a network"):
        load_checkpoint(Net(), read_pickle(path, trusted=trusted))


@pytest.mark.parametrize("opcodes", [
    b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x07\x00\x00\x00__doc__X\x01\x00\x00\x00!st\x86b.",
    b"cnumpy\ndtype\n(N}X\x07\x00\x00\x00__doc__X\x01\x00\x00\x00!st\x86b.",
    b"cnumpy._core.multiarray\n_reconstruct\n(N}X\x07\x00\x00\x00__doc__X\x01\x00\x00\x00!st\x86b.",
    b"ccollections\nOrderedDict\n(N}X\x07\x00\x00\x00__doc__X\x01\x00\x00\x00!st\x86b.",
])  # fmt: skip
def test_pickles_change_no_function(tmp_path: Path, opcodes: bytes) -> None:
    """BUILD sets attributes of what a name stands for; here that is never torch's own function or Python's class."""
    path = tmp_path / "w.pt"

    def documented() -> list[str | None]:
        return [found.__doc__ for found in (torch._utils._rebuild_tensor_v2, OrderedDict, np.dtype, StoredArray)]

    before = documented()
    magic, version, system = 0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}
    head = b"".join(pickle.dumps(item, 2) for item in (magic, version, system))
    path.write_bytes(head + b"\x80\x02" + opcodes + pickle.dumps([], 2))
    with contextlib.suppress(RejectedModelError):
        read_pickle(path, trusted=False)
    assert documented() == before


def test_damaged_files(tmp_path: Path) -> None:
    """An error of ours, whatever is cut off."""
    path = tmp_path / "w.pt"
    torch.save(A, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in (100, 1000, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(RejectedModelError):
            read_pickle(path, trusted=False)


def test_modules_without_their_code(tmp_path: Path) -> None:
    """A whole module's state dict is read from its parts; buffers that are not saved are no part of it."""
    module = Net()
    module.register_buffer("cache", torch.ones(3), persistent=False)
    path = tmp_path / "m.pt"
    torch.save({"model": module, "epoch": 3}, path)
    got, notes = loaded(Net(), read_pickle(path, trusted=False))
    assert same(got, module.state_dict())
    assert not notes
