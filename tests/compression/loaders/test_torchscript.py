"""TorchScript archives become ONNX models that compute the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from modelpress_compression.errors import (
    CompressionError,
    InvalidInputsError,
    RejectedModelError,
    UnsupportedFormatError,
)
from modelpress_compression.loaders import load
from modelpress_compression.loaders.script_check import check_pickle
from modelpress_compression.loaders.script_graph import in_plain_operators
from modelpress_compression.loaders.vision_ops import nms, vision_operators
from oracles.plain_run import run_onnx

Save = Callable[[torch.nn.Module, Path], Path]


class Branching(torch.nn.Module):
    """Takes another way for large inputs, and an option of integer type."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, rate: int) -> torch.Tensor:
        if rate not in (8000, 16000):
            raise ValueError("Supported rates: 8000, 16000")
        return self.first(x) if rate == 16000 else self.second(x)


class Counting(torch.nn.Module):
    """Keeps a running sum between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = torch.nn.LSTMCell(4, 5)
        self.total = torch.zeros([0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not len(self.total):
            self.total = torch.zeros([x.size(0), 5])
        hidden, _ = self.cell(x)
        self.total = self.total + hidden
        return self.total


class TwoInputs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embed(ids) * mask.unsqueeze(-1)
        return {"hidden": hidden, "mean": hidden.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)}


@pytest.mark.parametrize("fixture", ["scripted", "traced"])
def test_same_numbers_at_every_size(fixture: str, small_net: torch.nn.Module, request: pytest.FixtureRequest) -> None:
    """Batch, height and width stay dynamic; rtol 1e-4 against torch."""
    model = load(request.getfixturevalue(fixture), ["image:float32[batch,1,H,W]"])
    assert [str(spec) for spec in model.inputs] == ["image:float32[batch,1,H,W]"]
    assert [str(spec) for spec in model.outputs] == ["output:float32[batch,5]"]
    assert model.provenance.format == "torchscript"
    for shape in ((1, 1, 12, 12), (3, 1, 17, 9)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        with torch.no_grad():
            wanted = small_net(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(run_onnx(model, [{"image": x}])[0]["output"], wanted, rtol=1e-4, atol=1e-5)


def test_fixed_dimensions_stay_fixed(scripted: Path) -> None:
    """Numbers in the hint are the model's shape."""
    model = load(scripted, ["x:float32[1,1,20,20]"])
    assert [str(spec) for spec in (*model.inputs, *model.outputs)] == ["x:float32[1,1,20,20]", "output:float32[1,5]"]


def test_without_hints_the_first_layer_tells(scripted: Path, traced: Path) -> None:
    """The message says what the first layer takes, what a trace recorded, and what to type."""
    with pytest.raises(InvalidInputsError, match=r"conv2d, 1 input channel\. Try --input 'x:float32\[batch,1,H,W\]'"):
        load(scripted)
    with pytest.raises(InvalidInputsError, match=r"traced with x:float32\[1,1,12,12\]"):
        load(traced)


def test_what_was_traced_is_suggested_where_no_layer_tells(tmp_path: Path) -> None:
    """A module whose weights are not its layers' own: all but the batch as it was traced."""

    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) * 2

    path = tmp_path / "m.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")
        torch.jit.trace(Scaled(), torch.zeros(1, 3, 16, 16)).save(str(path))
    with pytest.raises(InvalidInputsError, match=r"Try --input 'x:float32\[batch,3,16,16\]'"):
        load(path)


class Encoder(torch.nn.Module):
    """Has no `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Numbered(torch.nn.Module):
    def forward(self, x: dict[int, torch.Tensor]) -> torch.Tensor:
        return x[0] + x[1]


@pytest.mark.parametrize("specs", [[], ["a:float32[n,4]", "b:float32[n,4]"]])
@pytest.mark.parametrize(("module", "said"), [(Encoder, "no method 'forward'.*it has encode"), (Numbered, "is a Dict")])
def test_what_has_no_inputs_of_tensors(module, said, specs, save_script: Save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Says so, whether inputs were given or not."""
    with pytest.raises(InvalidInputsError, match=said):
        load(save_script(module().eval(), tmp_path / "m.pt"), specs)


class Packed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.GRU(4, 5, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return torch.nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=6)[0]


def test_lengths_of_packed_sequences(tmp_path: Path) -> None:
    """They are at least 1; the batch varies. Within 1e-5 of torch."""
    module, sample = Packed().eval(), (torch.randn(2, 6, 4), torch.tensor([6, 4]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, sample).save(str(tmp_path / "m.pt"))
    model = load(tmp_path / "m.pt", ["x:float32[n,6,4]", "lengths:int64[n]"])
    x, lengths = torch.randn(3, 6, 4), torch.tensor([1, 6, 3])
    with torch.no_grad():
        wanted = module(x, lengths).numpy()
    (got,) = run_onnx(model, [{"x": x.numpy(), "lengths": lengths.numpy()}])[0].values()
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_was_optimized_for_inference(small_net: torch.nn.Module, tmp_path: Path) -> None:
    """torch writes constants of oneDNN without their values, and cannot read the file again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")
        frozen = torch.jit.freeze(torch.jit.script(small_net.eval()))
        torch.jit.optimize_for_inference(frozen).save(str(tmp_path / "m.pt"))
    with pytest.raises(UnsupportedFormatError, match=r"optimize_for_inference.*as it was before"):
        load(tmp_path / "m.pt", ["x:float32[n,1,12,12]"])


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (torch.nn.Linear(7, 2), "linear, 7 input features.*float32[batch,7]"),
        (torch.nn.Embedding(9, 2), "embedding, ids below 9.*int64[batch,seq]"),
        (torch.nn.LSTM(3, 4, batch_first=True), "lstm, 3 input features.*float32[batch,seq,3]"),
        (torch.nn.GRU(3, 4), "gru, 3 input features.*float32[seq,batch,3]"),
        (torch.nn.Conv1d(4, 8, 3, groups=2), "conv1d, 4 input channels.*float32[batch,4,length]"),
    ],
)
def test_hints_of_other_layers(layer: torch.nn.Module, said: str, tmp_path: Path, save_script: Save) -> None:
    """Each kind of first layer has its words and its suggestion."""
    with pytest.raises(InvalidInputsError) as caught:
        load(save_script(torch.nn.Sequential(torch.nn.Identity(), layer), tmp_path / "m.pt"))
    for part in said.split(".*"):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("hints", "said"),
    [
        (["x:float32[batch,3,12,12]"], "expected input.*channels"),
        (["x:float32[batch,1,12]"], "Expected|expected"),
        (["x:int64[batch,1,12,12]"], "type|dtype"),
        (["x:float32[batch,1,12,12]", "y:float32[1]"], r"forward\(x: Tensor\)"),
    ],
)
def test_wrong_hints(scripted: Path, hints: list[str], said: str) -> None:
    """The error repeats what the module said."""
    with pytest.raises(InvalidInputsError, match=said):
        load(scripted, hints)


def test_integer_arguments(tmp_path: Path, save_script: Save) -> None:
    """A `rate: int` becomes an input without dimensions; both ways of the branch are kept."""
    torch.manual_seed(0)
    module = Branching().eval()
    model = load(save_script(module, tmp_path / "m.pt"), ["x:float32[batch,6]", "rate:int64[]"])
    assert [str(spec) for spec in model.inputs] == ["x:float32[batch,6]", "rate:int64[]"]
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    for rate in (16000, 8000):
        with torch.no_grad():
            wanted = module(torch.from_numpy(x), rate).numpy()
        got = run_onnx(model, [{"x": x, "rate": np.array(rate)}])[0]["output"]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_state_starts_anew_with_a_warning(tmp_path: Path, save_script: Save) -> None:
    """A module that assigns to itself is converted as of its first call, and the report will say so."""
    torch.manual_seed(0)
    module = Counting().eval()
    path = save_script(module, tmp_path / "m.pt")
    model = load(path, ["x:float32[batch,4]"])
    assert any("keeps state between calls (it assigns to total)" in warning for warning in model.warnings)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    with torch.no_grad():
        wanted = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_onnx(model, [{"x": x}])[0]["output"], wanted, rtol=1e-5, atol=1e-6)


def test_several_inputs_and_outputs(tmp_path: Path, save_script: Save) -> None:
    """One word is one dimension in all inputs; inputs go by name whatever their order; a dict has several outputs."""
    path = save_script(TwoInputs().eval(), tmp_path / "m.pt")
    model = load(path, ["mask:float32[n,t]", "ids:int64[n,t]"])
    assert [str(spec) for spec in model.inputs] == ["ids:int64[n,t]", "mask:float32[n,t]"]
    assert [str(spec) for spec in model.outputs] == ["output_0:float32[n,t,4]", "output_1:float32[n,4]"]


def test_a_batch_that_cannot_vary(tmp_path: Path, save_script: Save) -> None:
    """A module that takes one batch size is not given a dynamic one."""

    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 4) * 2

    path = save_script(Fixed(), tmp_path / "m.pt")
    with pytest.raises(InvalidInputsError, match="'batch' cannot vary"):
        load(path, ["x:float32[batch,4]"])
    assert load(path, ["x:float32[2,4]"]).inputs[0].shape == (2, 4)


def test_modules_in_training_mode(tmp_path: Path, save_script: Save, small_net: torch.nn.Module) -> None:
    """Dropout and batch statistics are off in the result."""
    torch.manual_seed(0)
    module = type(small_net)()
    module.load_state_dict(small_net.state_dict())
    model = load(save_script(module.train(), tmp_path / "m.pt"), ["x:float32[batch,1,12,12]"])
    x = np.random.default_rng(0).standard_normal((4, 1, 12, 12)).astype(np.float32)
    with torch.no_grad():
        wanted = small_net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_onnx(model, [{"x": x}])[0]["output"], wanted, rtol=1e-4, atol=1e-5)


class Joins(torch.nn.Module):
    """Takes a list of any length, and a pair that may be left out, as recurrent layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(
        self,
        x: torch.Tensor,
        parts: list[torch.Tensor],
        pair: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        total = self.layer(x)
        for index, part in enumerate(parts):
            total = total + self.layer(part) * (index + 2)
        if pair is not None:
            total = total + pair[0] * pair[1]
        return total + torch.cat(parts, 1).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (["x", "parts.0", "parts.1"], ["x", "parts.0", "parts.1"]),
        (["parts.1", "x", "parts.0"], ["x", "parts.0", "parts.1"]),
        (["a", "b", "c", "d"], ["a", "b", "c", "d"]),
        (["pair.1", "pair.0", "x", "parts.0"], ["x", "parts.0", "pair.0", "pair.1"]),
    ],
)
def test_lists_and_tuples_of_tensors(names: list[str], given: list[str], tmp_path: Path, save_script: Save) -> None:
    """An input for each tensor, by name in any order; by position, the list takes what is left. rtol 1e-5."""
    torch.manual_seed(0)
    module = Joins().eval()
    model = load(save_script(module, tmp_path / "m.pt"), [f"{name}:float32[batch,4]" for name in names])
    assert [spec.name for spec in model.inputs] == given
    x = {name: torch.randn(3, 4) for name in given}
    pair = (x["pair.0"], x["pair.1"]) if "pair.0" in x else None
    parts = [tensor for name, tensor in list(x.items())[1:] if not name.startswith("pair")]
    wanted = module(x[given[0]], parts, pair).detach().numpy()
    got = run_onnx(model, [{name: tensor.numpy() for name, tensor in x.items()}])[0]["output"]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


class Keyed(torch.nn.Module):
    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        return x["a"] - x["b"]


@pytest.mark.parametrize("names", [["a", "b"], ["x.b", "x.a"]])
def test_dicts_of_tensors(names: list[str], tmp_path: Path, save_script: Save) -> None:
    """Keys are the inputs' names, with the argument's before them or not."""
    model = load(save_script(Keyed(), tmp_path / "m.pt"), [f"{name}:float32[n,4]" for name in names])
    feed = {name: np.full((2, 4), 3 if name.endswith("a") else 1, np.float32) for name in names}
    np.testing.assert_array_equal(run_onnx(model, [feed])[0]["output"], np.full((2, 4), 2, np.float32))


class TwoLists(torch.nn.Module):
    def forward(self, left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
        return left[0] - right[0]


@pytest.mark.parametrize("names", [["a", "b"], ["left.0", "right.1"], []])
def test_how_the_tensors_of_lists_are_named(names: list[str], tmp_path: Path, save_script: Save) -> None:
    """Said where it cannot be told which tensor goes where, where a place is left out, and where no input is given."""
    path = save_script(TwoLists(), tmp_path / "m.pt")
    with pytest.raises(InvalidInputsError, match=r"left\.0.*left\.1.*right\.0.*right\.1"):
        load(path, [f"{name}:float32[batch,4]" for name in names])
    assert len(load(path, ["left.0:float32[n,4]", "right.0:float32[n,4]"]).inputs) == 2


def test_operators_without_onnx(tmp_path: Path, save_script: Save) -> None:
    """What no exporter converts is an error that says which operator it was."""

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x).real

    with pytest.raises(CompressionError, match=r"could not be converted to ONNX") as caught:
        load(save_script(Odd(), tmp_path / "m.pt"), ["x:float32[4,4]"])
    assert "eigvals" in caught.value.message


def test_damaged_archives(scripted: Path, tmp_path: Path, make: SimpleNamespace) -> None:
    """Cut short, or with a pickle that is none."""
    raw = scripted.read_bytes()
    (tmp_path / "a.pt").write_bytes(raw[: len(raw) // 2])
    make.rewrite(scripted, tmp_path / "b.pt", {"data.pkl": b"no pickle"})
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UnsupportedFormatError):
            load(tmp_path / name, ["x:float32[batch,1,12,12]"])


def test_nothing_is_printed(
    scripted: Path, tmp_path: Path, save_script: Save, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither by exporters that succeed nor by those that fail."""
    load(scripted, ["x:float32[batch,1,12,12]"])
    load(save_script(Counting().eval(), tmp_path / "m.pt"), ["x:float32[batch,4]"])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize(
    "attack",
    [
        'torch.save(x, "{marker}")',
        'ops.aten.save(x, "{marker}")',
        'torch . save(x, "{marker}")',
        'getattr(torch, "sa" "ve")(x, "{marker}")',
        'torch.from_file("{marker}", True, 4)',
    ],
)
def test_code_that_reaches_files_is_refused(scripted: Path, tmp_path: Path, make: SimpleNamespace, attack: str) -> None:
    """`aten::save` and `aten::from_file` touch files, and would already in `__setstate__` while the archive loads."""
    marker = tmp_path / "touched"
    code = (
        "class Extra(Module):\n  __parameters__ = []\n  __buffers__ = []\n  def forward(self, x: Tensor) -> Tensor:\n"
        f"    _0 = {attack.format(marker=marker)}\n    return x\n"
    )
    changed = make.rewrite(scripted, tmp_path / "m.pt", {"code/__torch__/extra.py": code.encode()})
    with pytest.raises(RejectedModelError) as caught:
        load(changed, ["x:float32[batch,1,12,12]"])
    assert caught.value.metadata["finding"] == "SCRIPT_OPERATOR"
    assert not marker.exists()


def test_pickles_in_an_archive_are_refused(scripted: Path, tmp_path: Path, make: SimpleNamespace) -> None:
    """A pickle that names Python's functions is no TorchScript."""
    marker = tmp_path / "executed"
    for member in ("data.pkl", "constants.pkl", "traced_inputs.pkl"):
        changed = make.rewrite(scripted, tmp_path / "m.pt", {member: make.touching_pickle(marker)})
        with pytest.raises(RejectedModelError) as caught:
            load(changed, ["x:float32[batch,1,12,12]"])
        assert caught.value.metadata["finding"] == "PICKLE_GLOBAL"
    assert not marker.exists()


def test_pickles_know_the_classes_of_the_archive_only() -> None:
    """Classes of the archive pass; Python's and native ones do not."""
    check_pickle(b"\x80\x02c__torch__.a\nNet\n.", "it")
    check_pickle(b"\x80\x02c__torch__.torch.classes.quantized\nConv2dPackedParamsBase\n.", "it")
    for name in (b"os\nsystem", b"__torch__x\nNet", b"__torch__.torch.classes.dist_rpc\nMessage"):
        with pytest.raises(RejectedModelError):
            check_pickle(b"\x80\x02c" + name + b"\n.", "it")


def test_code_is_checked_whatever_the_case_of_its_folder(scripted: Path, tmp_path: Path, make: SimpleNamespace) -> None:
    """torch finds `CODE/` where it looks for `code/`."""
    path = make.rewrite(scripted, tmp_path / "m.pt", {"CODE/__torch__.py": b"def f(x):\n  torch.save(x, 'a')\n"})
    with pytest.raises(RejectedModelError) as caught:
        load(path, ["x:float32[batch,1,12,12]"])
    assert caught.value.metadata["finding"] == "SCRIPT_OPERATOR"


def save_traced(module: torch.nn.Module, tensors: Any, path: Path) -> torch.jit.ScriptModule:
    """The traced module, which is saved too."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; files of it are not
        traced: Any = torch.jit.trace(module, tensors, check_trace=False)
        torch.jit.save(traced, path)
    script: torch.jit.ScriptModule = traced
    return script


class Masked(torch.nn.Module):
    """An encoder whose padding is left out: traced, it makes a nested tensor of its input."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu", norm_first=False)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.encoder(x, src_key_padding_mask=mask)
        return result


class Findings(torch.nn.Module):
    """A list of what was found, of several types, as detectors give it."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        best, place = x.max(1)
        return [best, place, x.mean(1, keepdim=True)]


@pytest.mark.parametrize("way", ["traced", "scripted"])
def test_a_list_of_results(way: str, tmp_path: Path, save_script: Save) -> None:
    """A list becomes so many outputs, each of its own type; exporters write it as one sequence, of one type."""
    path = tmp_path / "m.pt"
    if way == "traced":
        save_traced(Findings(), (torch.randn(2, 5),), path)
    else:
        path = save_script(Findings(), path)
    model = load(path, ["x:float32[n,5]"])
    assert [str(spec) for spec in model.outputs] == [
        "output_0:float32[n]", "output_1:int64[n]", "output_2:float32[n,1]",
    ]  # fmt: skip
    x = torch.randn(3, 5)
    got = run_onnx(model, [{"x": x.numpy()}])[0]
    for wanted, found in zip(Findings()(x), got.values(), strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)  # of a mean near zero


class Experts(torch.nn.Module):
    """Rows sorted by expert, times the expert's weight, and back in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, order = torch.sort(x[:, :4].argmax(1))
        counts = torch.histc(ids.float(), bins=4, min=0, max=3)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        return torch._grouped_mm(x[order], self.weight, offs=ends)[torch.argsort(order)]


def test_products_of_experts(tmp_path: Path) -> None:
    """A product for each expert, of which some have no row; rtol 1e-4."""
    torch.manual_seed(0)
    module = Experts().eval()
    save_traced(module, (torch.randn(6, 8),), tmp_path / "m.pt")
    model = load(tmp_path / "m.pt", ["x:float32[n,8]"])
    for rows in (1, 2, 40):
        x = torch.randn(rows, 8)
        got = run_onnx(model, [{"x": x.numpy()}])[0]["output"]
        np.testing.assert_allclose(got, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


class Histogram(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.histc(x, bins=5, min=-1.0, max=1.5)


def test_histogram(tmp_path: Path) -> None:
    """Numbers outside of the limits count nowhere, the upper limit in the last bin."""
    save_traced(Histogram(), (torch.randn(6),), tmp_path / "m.pt")
    x = torch.tensor([-1.0, -1.01, -0.5, 0.0, 0.49, 0.51, 1.0, 1.5, 1.51, 7.0, 1.49])
    got = run_onnx(load(tmp_path / "m.pt", ["x:float32[n]"]), [{"x": x.numpy()}])[0]["output"]
    np.testing.assert_array_equal(got, Histogram()(x).numpy())


def test_attention_of_the_fast_path(tmp_path: Path) -> None:
    """Traced in evaluation mode, torch's encoder is one operator a layer; padding stays hidden; rtol 1e-4."""
    torch.manual_seed(0)
    module = Masked().eval()
    mask = torch.arange(5) >= torch.tensor([[5], [3]])
    traced = save_traced(module, (torch.randn(2, 5, 8), mask), tmp_path / "m.pt")
    assert "_transformer_encoder_layer_fwd" in str(traced.inlined_graph)
    model = load(tmp_path / "m.pt", ["x:float32[n,t,8]", "mask:bool[n,t]"])
    x, hidden = torch.randn(3, 7, 8), torch.arange(7) >= torch.tensor([[7], [2], [4]])
    with torch.no_grad():
        wanted = traced(x, hidden).numpy()
    got = run_onnx(model, [{"x": x.numpy(), "mask": hidden.numpy()}])[0]["output"]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


class Detects(torch.nn.Module):
    """The end of a detector: boxes that overlap go, and features are read where the rest are."""

    def forward(self, features: torch.Tensor, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.ops.torchvision.nms(boxes, scores, 0.3)
        regions = torch.cat([torch.zeros(kept.shape[0], 1), boxes[kept]], dim=1)
        result: torch.Tensor = torch.ops.torchvision.roi_align(features, regions, 0.5, 3, 2, -1, True)
        return result


def test_operators_of_torchvision(tmp_path: Path) -> None:
    """nms and roi_align are read, run and converted without torchvision, and are gone afterwards."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(-6, 30, (20, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(4, 20, (20, 2))], 1).astype(np.float32)
    feeds = {"image": rng.standard_normal((1, 3, 16, 18)), "boxes": boxes, "scores": rng.random(20)}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    with vision_operators():
        tensors = [torch.from_numpy(array) for array in feeds.values()]
        traced = save_traced(Detects(), tensors, tmp_path / "m.pt")
        wanted = traced(*tensors).numpy()
        del traced
    model = load(tmp_path / "m.pt", ["image:float32[1,3,16,18]", "boxes:float32[k,4]", "scores:float32[k]"])
    assert {"NonMaxSuppression", "RoiAlign"} <= {node.op_type for node in model.nodes()}
    assert 2 < len(wanted) < 20
    np.testing.assert_allclose(run_onnx(model, [feeds])[0]["output"], wanted, rtol=1e-4, atol=1e-5)


class Rotates(torch.nn.Module):
    """Names an operator of torchvision in a branch that is not taken, as `box_iou` does."""

    def forward(self, boxes: torch.Tensor) -> torch.Tensor:
        if boxes.shape[1] == 5:
            result: torch.Tensor = torch.ops.torchvision.box_iou_rotated(boxes, boxes)
            return result
        return boxes * 2.0


def test_operators_of_branches_that_are_not_taken(tmp_path: Path, save_script: Save) -> None:
    """Such an archive is read without torchvision."""
    with vision_operators():
        path = save_script(Rotates(), tmp_path / "m.pt")
    boxes = np.ones((3, 4), np.float32)
    got = run_onnx(load(path, ["boxes:float32[n,4]"]), [{"boxes": boxes}])[0]["output"]
    np.testing.assert_array_equal(got, 2 * boxes)


def test_boxes_without_area_stay() -> None:
    """They overlap by 0 / 0, which suppresses nothing, as in torchvision and in onnxruntime."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 2, 2, 2], [2, 2, 2, 2], [0, 0, 4, 3.9]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), 0.5).tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore")  # torch's own, that torch.ao is deprecated
def test_quantized_modules(tmp_path: Path) -> None:
    """8-bit layers become quantize-dequantize pairs; results lie within 3 % of the largest, and that is said."""
    torch.manual_seed(0)
    weight = torch.quantize_per_tensor(torch.randn(4, 6), 0.02, 0, torch.qint8)
    layer = torch.ao.nn.quantized.Linear(6, 4)
    layer.set_weight_bias(weight, torch.randn(4))
    layer.scale, layer.zero_point = 0.02, 128
    module = torch.nn.Sequential(
        torch.ao.nn.quantized.Quantize(0.03, 128, torch.quint8), layer, torch.ao.nn.quantized.DeQuantize()
    ).eval()
    x = torch.randn(5, 6)
    save_traced(module, x, tmp_path / "m.pt")
    model = load(tmp_path / "m.pt", ["x:float32[n,6]"])
    assert any("quantized already" in warning for warning in model.warnings)
    wanted = module(x).numpy()
    got = run_onnx(model, [{"x": x.numpy()}])[0]["output"]
    np.testing.assert_allclose(got, wanted, atol=0.03 * np.abs(wanted).max())


def save_both(module: torch.nn.Module, tensors: Sequence[torch.Tensor], folder: Path, save_script: Save) -> list[Path]:
    """The module traced and scripted."""
    save_traced(module, tuple(tensors), folder / "traced.pt")
    return [folder / "traced.pt", save_script(module, folder / "scripted.pt")]


class Quantized(torch.nn.Module):
    """Layers that quantize statically, and a mean on a quantized tensor, which is rounded as well."""

    def __init__(self) -> None:
        super().__init__()
        nnq = torch.ao.nn.quantized
        self.enter, self.leave = nnq.Quantize(0.03, 120, torch.quint8), nnq.DeQuantize()
        self.conv = torch.ao.nn.intrinsic.quantized.ConvReLU2d(3, 4, 3, stride=2)
        self.conv.set_weight_bias(
            torch.quantize_per_channel(
                torch.randn(4, 3, 3, 3), torch.full([4], 0.02), torch.zeros(4).long(), 0, torch.qint8
            ),
            torch.randn(4),
        )
        self.conv.scale, self.conv.zero_point = 0.04, 0
        self.up = nnq.ConvTranspose2d(4, 4, 2, stride=2)
        self.up.set_weight_bias(torch.quantize_per_tensor(torch.randn(4, 4, 2, 2), 0.02, 0, torch.qint8), None)
        self.up.scale, self.up.zero_point = 0.05, 128
        self.elu = nnq.ELU(0.05, 20, 1.0)
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.sum = nnq.QFunctional()
        self.sum.scale, self.sum.zero_point = 0.06, 40
        self.dense = nnq.Linear(4, 5)
        self.dense.set_weight_bias(torch.quantize_per_tensor(torch.randn(5, 4), 0.02, 0, torch.qint8), torch.randn(5))
        self.dense.scale, self.dense.zero_point = 0.05, 128

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.elu(self.up(self.conv(self.enter(x))))
        y = torch.sigmoid(self.dense(torch.flatten(self.pool(self.sum.add(y, y)), 1)))
        result: torch.Tensor = self.leave(y)
        return result


@pytest.mark.filterwarnings("ignore")  # torch's own, that torch.ao is deprecated
def test_quantized_layers_become_float_ones(tmp_path: Path, save_script: Save) -> None:
    """Convolutions, sums, activations and means on the grid of 8 bits: within a step or two, traced or scripted."""
    torch.manual_seed(1)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm" if "fbgemm" in torch.backends.quantized.supported_engines else before
    try:
        module = Quantized().eval()
        x = torch.randn(3, 3, 11, 13)
        wanted = module(x).numpy()
        for path in save_both(module, [torch.randn(2, 3, 9, 9)], tmp_path, save_script):
            model = load(path, ["x:float32[n,3,h,w]"])
            assert any("quantized already" in warning for warning in model.warnings)
            got = run_onnx(model, [{"x": x.numpy()}])[0]["output"]
            np.testing.assert_allclose(got, wanted, atol=0.03 * np.abs(wanted).max())
    finally:
        torch.backends.quantized.engine = before


class Dynamic(torch.nn.Module):
    """Layers that quantize their inputs by the range of each batch."""

    def __init__(self, kind: type[torch.nn.Module]) -> None:
        super().__init__()
        self.recurrent = kind(6, 5, 2, batch_first=True, bidirectional=True)
        self.dense = torch.nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.dense(self.recurrent(x)[0])
        return result


@pytest.mark.filterwarnings("ignore")  # torch's own, that torch.ao is deprecated
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_dynamically_quantized_layers(
    tmp_path: Path, save_script: Save, kind: type[torch.nn.Module], dtype: torch.dtype
) -> None:
    """Linear, LSTM and GRU become float layers on the weights that are stored; within 3 % of the largest."""
    torch.manual_seed(0)
    quantize: Any = torch.ao.quantization.quantize_dynamic
    module = quantize(Dynamic(kind).eval(), {torch.nn.Linear, kind}, dtype)
    x = torch.randn(3, 7, 6)
    wanted = module(x).detach().numpy()
    for path in save_both(module, [torch.randn(2, 5, 6)], tmp_path, save_script):
        model = load(path, ["x:float32[n,t,6]"])
        got = run_onnx(model, [{"x": x.numpy()}])[0]["output"]
        np.testing.assert_allclose(got, wanted, atol=0.03 * np.abs(wanted).max())


@pytest.mark.parametrize("given", ["bfloat16", "float32"])
def test_bfloat16_becomes_float32(tmp_path: Path, save_script: Save, given: str) -> None:
    """Weights and casts; inputs are float32 in ONNX, whatever was said; rtol 2e-2, as bfloat16 rounds to 4e-3."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, dtype=torch.bfloat16)
            self.norm = torch.nn.BatchNorm2d(4, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(self.conv(x.to(torch.bfloat16))).relu()
            return result

    torch.manual_seed(0)
    module = Module().eval()
    x = torch.randn(3, 3, 9, 7)
    wanted = module(x).float().detach().numpy()
    for path in save_both(module, [x], tmp_path, save_script):
        model = load(path, [f"x:{given}[n,3,h,w]"])
        assert [spec.dtype for spec in (*model.inputs, *model.outputs)] == ["float32", "float32"]
        assert any("computes in bfloat16" in warning for warning in model.warnings)
        got = run_onnx(model, [{"x": x.numpy()}])[0]["output"]
        np.testing.assert_allclose(got, wanted, rtol=2e-2, atol=2e-2)


def test_integers_divided_by_a_number(tmp_path: Path) -> None:
    """What is traced as a float64 without axes counts as a number, as in embeddings of time steps and of positions: the
    result is float32; rtol 1e-4."""

    class Steps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leave = torch.nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            angles = x[:, None] * torch.exp(-torch.arange(8) / 4.0)
            found: torch.Tensor = self.leave(angles.sin())
            return found

    module, path = Steps().eval(), tmp_path / "m.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(module, torch.zeros(2)).save(path)
    x = torch.linspace(0, 9, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        frozen = torch.jit.freeze(in_plain_operators(torch.jit.load(path)))
    torch.testing.assert_close(frozen(x), module(x), rtol=1e-4, atol=1e-5)
    got = run_onnx(load(path, ["x:float32[n]"]), [{"x": x.numpy()}])[0]["output"]
    np.testing.assert_allclose(got, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_float16_within(tmp_path: Path) -> None:
    """A module that computes in float16 between float32 ends is compared as float16 rounds; rtol 1e-2."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = torch.nn.Linear(64, 32, dtype=torch.float16)
            self.norm = torch.nn.LayerNorm(32, dtype=torch.float16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(self.dense(x.half())).float()
            return result

    torch.manual_seed(0)
    module, x = Module().eval(), torch.randn(3, 64)
    save_traced(module, x, tmp_path / "m.pt")
    got = run_onnx(load(tmp_path / "m.pt", ["x:float32[n,64]"]), [{"x": x.numpy()}])[0]["output"]
    np.testing.assert_allclose(got, module(x).detach().numpy(), rtol=1e-2, atol=1e-2)


class Attends(torch.nn.Module):
    """Attention by itself, and an encoder whose axes are [tokens, batch]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        y, weights = self.attention(x, x, x)
        return self.encoder(y.transpose(0, 1)), weights


def test_scripted_attention(tmp_path: Path, save_script: Save) -> None:
    """The fast path's questions of a scripted module are answered as in inference; rtol 1e-4."""
    torch.manual_seed(0)
    module, x = Attends().eval(), torch.randn(3, 7, 8)
    with torch.no_grad():
        wanted = [value.numpy() for value in module(x)]
    model = load(save_script(module, tmp_path / "m.pt"), ["x:float32[n,t,8]"])
    for got, want in zip(run_onnx(model, [{"x": x.numpy()}])[0].values(), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_scripted_encoder_with_a_mask(tmp_path: Path, save_script: Save) -> None:
    """Arguments that are left to their defaults are no inputs, and padding stays hidden; rtol 1e-4."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module = torch.nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(3, 7, 8), torch.arange(7) >= torch.tensor([[7], [2], [4]])
    with torch.no_grad():
        wanted = module(x, src_key_padding_mask=mask).numpy()
        plain = module(x).numpy()
    path = save_script(module, tmp_path / "m.pt")
    masked = load(path, ["src:float32[n,t,8]", "src_key_padding_mask:bool[n,t]"])
    got = run_onnx(masked, [{"src": x.numpy(), "src_key_padding_mask": mask.numpy()}])[0]["output"]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    got = run_onnx(load(path, ["src:float32[n,t,8]"]), [{"src": x.numpy()}])[0]["output"]
    np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-5)


class Floors(torch.nn.Module):
    """A result and, beside it, a list that grows layer by layer; many rows take another way."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[list[torch.Tensor], torch.Tensor]]:
        floors: list[torch.Tensor] = []
        for layer in self.layers:
            x = torch.relu(layer(x))
            floors.append(x)
        if x.size(0) > 20:
            x = x * 2
        return x, (floors, x.sum())


def test_lists_in_tuples_keep_control_flow(tmp_path: Path, save_script: Save) -> None:
    """Each tensor is an output, in order, and branches on sizes that no trial has are branches still; rtol 1e-5."""
    module = Floors().eval()
    model = load(save_script(module, tmp_path / "m.pt"), ["x:float32[n,6]"])
    assert "If" in [node.op_type for node in model.nodes()]
    for count in (2, 30):
        x = torch.randn(count, 6)
        with torch.no_grad():
            last, (floors, total) = module(x)
        got = run_onnx(model, [{"x": x.numpy()}])[0].values()
        for one, wanted in zip(got, (last, *floors, total), strict=True):
            np.testing.assert_allclose(one, wanted.numpy(), rtol=1e-5, atol=1e-6)
