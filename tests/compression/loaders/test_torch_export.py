"""torch.export archives become ONNX models, and execute nothing on the way."""

from __future__ import annotations

import io
import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from modelpress_compression.errors import (
    InvalidInputsError,
    RejectedModelError,
    UnsupportedFormatError,
    UnsupportedOperatorError,
)
from modelpress_compression.loaders import load
from modelpress_compression.loaders.expert_ops import expert_operators, grouped_mm
from modelpress_compression.loaders.exporters import ExportRequest, export_program
from modelpress_compression.loaders.plain_attention import attention_of, write_out
from modelpress_compression.loaders.program_check import check_tensors_only
from modelpress_compression.loaders.program_graph import check_expression
from modelpress_compression.loaders.program_trees import output_labels
from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.specs import TensorSpec
from oracles.plain_run import run_onnx
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_rows
from torch.utils import _pytree as pytree

PROGRAM = "models/model.json"


def test_same_numbers_and_names(exported: Path, small_net: torch.nn.Module) -> None:
    """The input keeps its name, the dynamic dimension is `batch` and not torch's symbol; rtol 1e-4 against torch."""
    model = load(exported)
    assert [str(spec) for spec in (*model.inputs, *model.outputs)] == [
        "x:float32[batch,1,12,12]",
        "output:float32[batch,5]",
    ]
    assert model.opset <= 26
    x = np.random.default_rng(0).standard_normal((3, 1, 12, 12)).astype(np.float32)
    with torch.no_grad():
        wanted = small_net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_onnx(model, [{"x": x}])[0]["output"], wanted, rtol=1e-4, atol=1e-5)


def test_hints_name_dimensions(exported: Path) -> None:
    """The archive does not keep the user's words, the command line can."""
    assert load(exported, ["x:float32[frames,1,12,12]"]).inputs[0].shape == ("frames", 1, 12, 12)
    with pytest.raises(InvalidInputsError, match="fixed size 12"):
        load(exported, ["x:float32[batch,1,H,W]"])


def test_training_mode_is_switched_off(small_net: torch.nn.Module, tmp_path: Path, make: SimpleNamespace) -> None:
    """Dropout and batch statistics of a program that was exported while training."""
    module = type(small_net)()
    module.load_state_dict(small_net.state_dict())
    path = make.save_program(module.train(), (torch.zeros(2, 1, 12, 12),), tmp_path / "m.pt2")
    model = load(path)
    assert any("training mode" in warning for warning in model.warnings)
    x = np.random.default_rng(0).standard_normal((2, 1, 12, 12)).astype(np.float32)
    with torch.no_grad():
        wanted = small_net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_onnx(model, [{"x": x}])[0]["output"], wanted, rtol=1e-4, atol=1e-5)


def test_weights_that_are_standardized_stay_so(tmp_path: Path, make: SimpleNamespace) -> None:
    """Batch statistics of a weight, as in normalizer-free networks, and of an instance are no matter of training."""

    class Standardized(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
            self.norm = torch.nn.InstanceNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = self.weight.reshape(1, 4, -1)
            weight = torch.nn.functional.batch_norm(flat, None, None, training=True, momentum=0.0)
            found: torch.Tensor = self.norm(torch.nn.functional.conv2d(x, weight.reshape_as(self.weight)))
            return found

    module = Standardized().eval()
    path = make.save_program(module, (torch.zeros(1, 3, 8, 8),), tmp_path / "m.pt2")
    model = load(path)
    assert not model.warnings
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        wanted = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_onnx(model, [{"x": x}])[0]["output"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3, "enable_gqa": True}])
def test_attention_as_products(options: dict[str, Any], tmp_path: Path) -> None:
    """What torch's exporter is given where it stops at attention (SAM with dynamic dimensions): the same numbers, and
    so in ONNX; rtol 1e-4."""

    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            few = x[:, :2] if options.get("enable_gqa") else x
            return torch.nn.functional.scaled_dot_product_attention(x, few, few, **options)

    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = Attention()(x)
        program = torch.export.export(Attention(), (x,))
        write_out(program, attention_of(program))
        assert not attention_of(program)
        torch.testing.assert_close(program.module()(x), wanted, rtol=1e-4, atol=1e-5)
        spec = TensorSpec("x", "float32", (2, 4, 6, 8))
        with quiet():
            written = export_program(program, ExportRequest(program.module, {}, (spec,), ["y"], tmp_path), "m.onnx")
    np.testing.assert_allclose(
        run_onnx(load(written), [{"x": x.numpy()}])[0]["y"], wanted.numpy(), rtol=1e-4, atol=1e-5
    )


def test_keyword_inputs_and_nested_outputs(tmp_path: Path, make: SimpleNamespace) -> None:
    """Several inputs keep their order and names; dicts and tuples are flattened."""

    class Nested(torch.nn.Module):
        def forward(self, a: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
            return {"sum": a + pair[0], "both": (a * pair[1], a)}

    x = torch.ones(2, 3)
    path = make.save_program(Nested(), (x, (x, x)), tmp_path / "m.pt2")
    model = load(path)
    assert [spec.name for spec in model.inputs] == ["a", "pair_0", "pair_1"]
    assert len(model.outputs) == 3


class SlidingWindow(torch.nn.Module):
    """Attention to two tokens back, without those that the mask leaves out."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        seen = (at <= at[:, None]) & (at > at[:, None] - 2)
        heads = x[:, None]
        found: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
            heads, heads, heads, seen & mask[:, None, None].bool()
        )
        return found[:, 0]


def test_attention_that_sees_nothing(tmp_path: Path, make: SimpleNamespace) -> None:
    """Behind the end of a short text a window is empty, and torch gives zeros; its exporter, the mean of all values."""
    feeds = torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.int64)
    path = make.save_program(SlidingWindow(), feeds, tmp_path / "m.pt2")
    x, mask = feeds[0], (torch.arange(6) < torch.tensor([[2], [5]])).long()
    wanted = SlidingWindow()(x, mask).numpy()
    assert not wanted[0, 4:].any()
    got = run_onnx(load(path), [{"x": x.numpy(), "mask": mask.numpy()}])[0]["output"]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


class Experts(torch.nn.Module):
    """As transformers exports mixtures of experts: with an operator of its own, or with torch's."""

    def __init__(self, product: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.product, self.weight = product, torch.nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, order = torch.sort(x[:, :3].argmax(1))
        ends = torch.cumsum(torch.histc(ids.float(), bins=3, min=0, max=2), 0, dtype=torch.int32)
        return self.product(x[order], self.weight, ends)[torch.argsort(order)]


@pytest.mark.parametrize("whose", ["transformers", "torch"])
def test_products_of_experts(whose: str, tmp_path: Path, make: SimpleNamespace) -> None:
    """A product for each expert, of which some have no row; rtol 1e-4 against float32. Transformers itself is not
    needed: its operator is known while the file is read."""
    torch.manual_seed(0)

    def of_torch(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, weight, offs=ends)

    def of_transformers(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, ends)
        return found

    module = Experts(of_torch if whose == "torch" else of_transformers).eval()
    dtype = torch.bfloat16 if whose == "torch" else torch.float32  # torch exports its own for bfloat16 alone
    module = module.to(dtype)
    rows = torch.export.Dim("rows", min=1)
    with expert_operators():
        path = make.save_program(
            module, (torch.randn(6, 8, dtype=dtype),), tmp_path / "m.pt2", dynamic_shapes={"x": {0: rows}}
        )
    model = load(path)
    for count in (1, 2, 40):
        x = torch.randn(count, 8)
        got = run_onnx(model, [{"x": x.numpy()}])[0]["output"]
        np.testing.assert_allclose(got, Experts.forward(_plain(module), x).detach().numpy(), rtol=1e-4, atol=1e-5)


def _plain(module: Experts) -> Experts:
    plain = Experts(grouped_mm)
    plain.load_state_dict(module.state_dict())
    return plain


def test_nothing_is_printed(exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The exporter's progress stays inside."""
    load(exported)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_damaged_archives(exported: Path, tmp_path: Path, make: SimpleNamespace) -> None:
    """Cut short, without weights, or with JSON that is none."""
    raw = exported.read_bytes()
    (tmp_path / "a.pt2").write_bytes(raw[: len(raw) // 2])
    make.rewrite(exported, tmp_path / "b.pt2", {"data/weights/weight_0": None})
    make.rewrite(exported, tmp_path / "c.pt2", {PROGRAM: b"{"})
    for name in ("a.pt2", "b.pt2", "c.pt2"):
        with pytest.raises(UnsupportedFormatError):
            load(tmp_path / name)


def edit(path: list[Any], value: Any) -> Callable[[Any], Any]:
    """Sets one place of a JSON document; the last step may be appended to a list with None."""

    def change(document: Any) -> Any:
        place = document
        for step in path[:-1]:
            place = place[step]
        if path[-1] is None:
            place.append(value)
        else:
            place[path[-1]] = value
        return document

    return change


def evil_names(document: Any) -> Any:
    """The input's name becomes source code in the generated function."""
    return json.loads(json.dumps(document).replace('"name": "x"', '"name": "x=__import__(\'os\').getpid()"'))


def evil_expression(document: Any) -> Any:
    text = json.dumps(document)
    start = text.index('"expr_str": "') + len('"expr_str": "')
    end = text.index('"', start)
    return json.loads(text[:start] + "__import__('pathlib').Path('MARKER').touch()" + text[end:])


SPEC = ["graph_module", "module_call_graph", 0, "signature"]
FACTORY = json.dumps({"default_factory_module": "this", "default_factory_name": "s", "dict_context": []})


@pytest.mark.parametrize(
    "change",
    [
        edit(["guards_code", None], "__import__('pathlib').Path('MARKER').touch()"),
        edit(["guards_code", None], "L['x'].size.__globals__['os']"),
        edit(["guards_code", None], "L['x\" + exit() + \"'].size()[0] == 1"),
        evil_expression,
        evil_names,
        edit(["graph_module", "graph", "nodes", 0, "target"], "torch.load"),
        edit(["graph_module", "graph", "nodes", 0, "target"], "torch.ops.load_library"),
        edit(["graph_module", "graph", "nodes", 0, "target"], "torch.ops.aten.from_file.default"),
        edit(["graph_module", "graph", "nodes", 0, "target"], "torch._functorch.predispatch.torch.load"),
        edit(["graph_module", "graph", "nodes", 0, "target"], "_operator.methodcaller"),
        edit(["graph_module", "graph", "nodes", 0, "target"], "#custom"),
        edit([*SPEC, "forward_arg_names"], ["x=exit()"]),
        edit(
            [*SPEC, "in_spec"],
            json.dumps([1, {"type": "collections.defaultdict", "context": FACTORY, "children_spec": []}]),
        ),
        edit(
            [*SPEC, "in_spec"],
            json.dumps(
                [1, {"type": "builtins.dict", "context": '[{"__enum__": true, "fqn": "this:s"}]', "children_spec": []}]
            ),
        ),
    ],
)
def test_programs_that_would_execute_python(
    exported: Path, tmp_path: Path, make: SimpleNamespace, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards, symbolic sizes, names, targets and pytrees are where torch evaluates text; none of it is evaluated."""
    monkeypatch.chdir(tmp_path)
    changed = make.rewrite(exported, tmp_path / "m.pt2", {PROGRAM: change})
    with pytest.raises(RejectedModelError) as caught:
        load(changed)
    assert caught.value.metadata["finding"] == "PROGRAM"
    assert not (tmp_path / "MARKER").exists()


def test_operators_of_other_libraries(exported: Path, tmp_path: Path, make: SimpleNamespace) -> None:
    """A custom operator is named, not called malicious."""
    change = edit(["graph_module", "graph", "nodes", 0, "target"], "torch.ops.acme.blur.default")
    with pytest.raises(UnsupportedOperatorError, match="acme::blur"):
        load(make.rewrite(exported, tmp_path / "m.pt2", {PROGRAM: change}))


def uses_pickle(document: Any) -> Any:
    next(iter(document["config"].values()))["use_pickle"] = True
    return document


def custom_object(document: Any) -> Any:
    next(iter(document["config"].values()))["path_name"] = "opaque_obj_0"
    return document


@pytest.mark.parametrize(
    "members",
    [
        {"data/sample_inputs/model.pt": "PICKLE"},
        {"data/weights/model.pt": "PICKLE"},
        {"data/constants/model.pt": "PICKLE"},
        {"data/weights/weight_0": "PICKLE", "data/weights/model_weights_config.json": uses_pickle},
        {"data/weights/model_weights_config.json": custom_object},
        {"data/aotinductor/model/lib.so": b"\x7fELF"},
    ],
)
def test_members_that_would_be_executed(
    exported: Path, tmp_path: Path, make: SimpleNamespace, members: dict[str, Any]
) -> None:
    """Pickles wherever torch reads one, opaque objects, native libraries: refused, and no marker appears."""
    marker = tmp_path / "executed"
    pickled = make.touching_torch_save(marker)
    changes = {name: pickled if change == "PICKLE" else change for name, change in members.items()}
    changed = make.rewrite(exported, tmp_path / "m.pt", changes)
    with pytest.raises(RejectedModelError) as caught:
        load(changed)
    assert caught.value.metadata["finding"] in ("PICKLE_GLOBAL", "CUSTOM_OBJECT", "NATIVE_CODE")
    assert not marker.exists()


def test_bare_pickles_and_scripts_as_samples(
    exported: Path, scripted: Path, tmp_path: Path, make: SimpleNamespace
) -> None:
    """torch.load would take torch's old format and TorchScript there as well."""
    marker = tmp_path / "executed"
    for data in (make.touching_pickle(marker), scripted.read_bytes()):
        changed = make.rewrite(exported, tmp_path / "m.pt2", {"data/sample_inputs/model.pt": data})
        with pytest.raises(RejectedModelError):
            load(changed)
    assert not marker.exists()


def test_a_call_is_refused(tmp_path: Path, make: SimpleNamespace) -> None:
    """The refusal names the function; nothing is executed."""
    marker = tmp_path / "executed"
    with pytest.raises(RejectedModelError, match=r"pathlib.*touch|getattr") as caught:
        check_tensors_only(make.touching_pickle(marker), "The sample")
    assert caught.value.metadata["finding"] == "PICKLE_GLOBAL"
    assert not marker.exists()


@pytest.mark.parametrize("folder", ["serialized_net", "Net"])
def test_members_are_checked_whatever_the_folder(
    exported: Path, tmp_path: Path, make: SimpleNamespace, folder: str
) -> None:
    """The archive's own folder is called after the file, so its author names it."""
    marker = tmp_path / "executed"
    evil = {"data/sample_inputs/model.pt": make.touching_torch_save(marker)}
    path = make.rewrite(exported, tmp_path / "m.pt2", evil, folder=folder)
    with pytest.raises(RejectedModelError, match="would import"):
        load(path)
    assert not marker.exists()


def test_two_folders_are_refused(exported: Path, tmp_path: Path, make: SimpleNamespace) -> None:
    """torch reads the first folder, a table of names keeps the last one."""
    marker = tmp_path / "executed"
    evil = {"data/sample_inputs/model.pt": make.touching_torch_save(marker)}
    path = make.rewrite(exported, tmp_path / "m.pt2", evil, folder="evil")
    with zipfile.ZipFile(exported) as good, zipfile.ZipFile(path, "a") as both:
        for name in good.namelist():
            both.writestr(f"good/{name.split('/', 1)[1]}", good.read(name))
    with pytest.raises(RejectedModelError, match="in different folders"):
        load(path)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["Symbol('s77', positive=True, integer=True)", "2*s77 + 1", "Max(1, s0//2)", "s0"])
def test_symbolic_sizes_pass(text: str) -> None:
    """What torch writes is arithmetic."""
    check_expression(text, guard=False)


@pytest.mark.parametrize(
    "text", ["exit()", "s0.__class__", "(lambda: 1)()", "[1][0]", "'a b'", "f'{s0}'", "__import__"]
)
def test_other_expressions_do_not(text: str) -> None:
    """Anything that could reach an object beyond numbers is refused."""
    with pytest.raises(RejectedModelError):
        check_expression(text, guard=False)


@pytest.mark.parametrize(
    "text",
    [
        "(max(1, L['x'].size()[3] // 4)*max(1, L['x'].size()[2] // 4)) != 1",
        "math.trunc(torch.sym_float(L['x'].size()[0]) / 2.0) > min(2, abs(L['y'].stride()[1]))",
        "L['d']['u'].size()[0] == L['p'].a.size()[0]",
    ],
)
def test_guards_pass(text: str) -> None:
    """What torch writes of strided convolutions over images of any size, of rounded extents, and of inputs that are
    fields of named tuples."""
    check_expression(text, guard=True)


@pytest.mark.parametrize(
    "text",
    [
        "max(['exit()'], key=eval)", "eval('exit()')", "max.__call__(1)", "math.sys", "L['p'].a()", "L['p'].__class__",
        "L['p']._a.b", "f(L['p']).a",
    ],
)  # fmt: skip
def test_other_guards_do_not(text: str) -> None:
    """Functions of Python's own get numbers alone, and nothing to call."""
    with pytest.raises(RejectedModelError):
        check_expression(text, guard=True)


class Answer:
    """An output type of a library: a pytree by a registered name, which whoever reads the file need not know."""

    def __init__(self, **values: Any) -> None:
        self.values = values


class Cache:
    """As transformers' caches: keys and values of each layer."""

    def __init__(self, keys: list[torch.Tensor]) -> None:
        self.keys = keys


@contextmanager
def library_types() -> Iterator[None]:
    """Registers the two types above, and forgets them when the block ends."""
    pytree.register_pytree_node(
        Answer,
        lambda answer: (list(answer.values.values()), list(answer.values)),
        lambda values, names: Answer(**dict(zip(names, values, strict=True))),
        flatten_with_keys_fn=lambda answer: (
            [(pytree.MappingKey(name), value) for name, value in answer.values.items()],
            list(answer.values),
        ),
        serialized_type_name="acme.Answer",
        to_dumpable_context=json.dumps,
        from_dumpable_context=json.loads,
    )
    pytree.register_pytree_node(
        Cache,
        lambda cache: (cache.keys, None),
        lambda keys, _: Cache(list(keys)),
        flatten_with_keys_fn=lambda cache: ([(pytree.SequenceKey(i), key) for i, key in enumerate(cache.keys)], None),
        serialized_type_name="acme.Cache",
        to_dumpable_context=lambda _: "{}",
        from_dumpable_context=lambda _: None,
    )
    yield
    for known in (Answer, Cache):
        pytree._deregister_pytree_node(known)


def check_same(path: Path, module: torch.nn.Module, runs: Sequence[Sequence[torch.Tensor]]) -> list[str]:
    """Loads, compares with the module's tensors at each of `runs` (rtol 1e-4), and returns the warnings."""
    model = load(path)
    for tensors in runs:
        with torch.no_grad():
            wanted = [leaf for leaf in pytree.tree_leaves(module(*tensors)) if isinstance(leaf, torch.Tensor)]
        feeds = {spec.name: tensor.numpy() for spec, tensor in zip(model.inputs, tensors, strict=True)}
        got = run_onnx(model, [feeds])[0]
        assert len(got) == len(wanted)
        for have, want in zip(got.values(), wanted, strict=True):
            np.testing.assert_allclose(have, want.numpy(), rtol=1e-4, atol=1e-5)
    return list(model.warnings)


def test_types_of_libraries(tmp_path: Path, make: SimpleNamespace) -> None:
    """Types that a library registered are read for their tensors alone: nothing of the library is imported."""

    class Uses(torch.nn.Module):
        def forward(self, x: torch.Tensor, cache: Cache) -> Answer:
            return Answer(logits=x + cache.keys[0], cache=Cache([x * cache.keys[1]]))

    x, key, value = torch.zeros(3, 2, 3).unbind()
    with library_types():
        path = make.save_program(Uses(), (x.clone(), Cache([key.clone(), value.clone()])), tmp_path / "m.pt2")
    model = load(path)
    assert [spec.name for spec in model.inputs] == ["x", "cache_0", "cache_1"]
    feeds = {spec.name: np.full((2, 3), index + 2, np.float32) for index, spec in enumerate(model.inputs)}
    assert [spec.name for spec in model.outputs] == ["logits", "cache"]
    first, second = run_onnx(model, [feeds])[0].values()
    np.testing.assert_array_equal(first, np.full((2, 3), 5))
    np.testing.assert_array_equal(second, np.full((2, 3), 8))


def odd_names() -> torch.nn.Module:
    children = [("c-d", torch.nn.Linear(4, 4)), ("x y", torch.nn.ReLU()), ("a/b", torch.nn.Linear(4, 2))]
    inner = OrderedDict[str, torch.nn.Module](children)
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Sequential(inner))


@pytest.mark.parametrize("dim", [torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO, torch.export.Dim("n", max=64)])
def test_roots_and_dimensions(dim: Any, tmp_path: Path, make: SimpleNamespace) -> None:
    """Modules whose children have numbers or odd words for names; every kind of dynamic dimension."""
    module = odd_names()
    path = make.save_program(module.eval(), (torch.randn(4, 6),), tmp_path / "m.pt2", ({0: dim},))
    assert load(path).inputs[0].shape == ("batch", 6)
    assert check_same(path, module, [(torch.randn(3, 6),), (torch.randn(7, 6),)]) == []


def test_dimensions_that_are_multiples(tmp_path: Path, make: SimpleNamespace) -> None:
    """A batch of pairs, 2 * half: sizes that the program takes, all even, are one dynamic dimension."""
    module = odd_names()
    dim = 2 * torch.export.Dim("half", max=32)
    path = make.save_program(module.eval(), (torch.randn(4, 6),), tmp_path / "m.pt2", ({0: dim},))
    assert load(path).inputs[0].shape == ("batch", 6)
    assert check_same(path, module, [(torch.randn(6, 6),), (torch.randn(10, 6),)]) == []


class TwoLengths(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1] // 2, 2).sum(2) + y[:, 1::2] + y[:, :-1:2]


def test_dimensions_of_inputs_that_follow_from_one(tmp_path: Path, make: SimpleNamespace) -> None:
    """2 * half of one input, 2 * half + 1 of the other."""
    half = torch.export.Dim("half", min=2, max=50)
    dims = {"x": {0: torch.export.Dim("n"), 1: 2 * half}, "y": {0: torch.export.Dim("n"), 1: 2 * half + 1}}
    module, sample = TwoLengths(), (torch.randn(2, 8), torch.randn(2, 9))
    path = make.save_program(module, sample, tmp_path / "m.pt2", dims)
    assert [spec.shape for spec in load(path).inputs] == [("batch", "dim_1"), ("batch", "y_dim_1")]
    others = [(torch.randn(n, 2 * k), torch.randn(n, 2 * k + 1)) for n, k in ((1, 3), (3, 6))]
    assert check_same(path, module, others) == []


def test_arguments_that_are_constants(tmp_path: Path, make: SimpleNamespace) -> None:
    """None, flags and numbers are part of the program; they are no inputs and no outputs."""

    class Options(torch.nn.Module):
        def forward(self, x: torch.Tensor, mask: Any, times: int, *, name: str) -> tuple[Any, ...]:
            return x * times, mask, name, x.shape[0]

    path = tmp_path / "m.pt2"
    program = torch.export.export(
        Options(),
        (torch.ones(2, 3), None, 3),
        {"name": "double"},
        dynamic_shapes={"x": {0: torch.export.Dim("n")}, "mask": None, "times": None, "name": None},
    )
    torch.export.save(program, path)
    model = load(path)
    assert [str(spec) for spec in (*model.inputs, *model.outputs)] == [
        "x:float32[batch,3]",
        "output_0:float32[batch,3]",
        "output_1:int64[]",
    ]
    got = run_onnx(model, [{"x": np.ones((5, 3), np.float32)}])[0]
    np.testing.assert_array_equal(got["output_0"], np.full((5, 3), 3))
    assert got["output_1"] == 5


class Remembers(torch.nn.Module):
    """Counts its calls, and writes what it saw into a part of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("seen", torch.zeros(4, 3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.add_(1.0)
        self.seen[1:3] = x
        return x * self.calls, self.seen.sum()


def test_state_of_a_program(tmp_path: Path, make: SimpleNamespace) -> None:
    """Every call starts from the saved state, and the warning says how to get the state in and out."""
    path = make.save_program(Remembers(), (torch.zeros(2, 3),), tmp_path / "m.pt2")
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    model = load(path)
    (warning,) = model.warnings
    assert "writes into calls, seen" in warning
    assert "--input 'calls:float32[1]'" in warning
    for _ in range(2):
        first, second = run_onnx(model, [{"x": x}])[0].values()
        np.testing.assert_allclose(first, x, rtol=1e-6)
        np.testing.assert_allclose(second, x.sum(), rtol=1e-5)


def test_state_as_input_and_output(tmp_path: Path, make: SimpleNamespace) -> None:
    """A buffer named as an input goes in and comes out; three calls give what the module gives; rtol 1e-5."""
    path = make.save_program(Remembers(), (torch.zeros(2, 3),), tmp_path / "m.pt2")
    model = load(path, ["x:float32[2,3]", "calls:float32[1]", "seen:float32[4,3]"])
    assert model.warnings == ()
    assert [spec.name for spec in model.inputs] == ["x", "calls", "seen"]
    assert [spec.name for spec in model.outputs][2:] == ["calls_out", "seen_out"]
    module, rng = Remembers(), np.random.default_rng(0)
    state = {"calls": np.zeros(1, np.float32), "seen": np.zeros((4, 3), np.float32)}
    for _ in range(3):
        x = rng.standard_normal((2, 3)).astype(np.float32)
        wanted = [item.numpy().copy() for item in module(torch.from_numpy(x))]
        got = run_onnx(model, [{"x": x, **state}])[0]
        state = {name: got[f"{name}_out"] for name in state}
        for have, want in zip(list(got.values())[:2], wanted, strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidInputsError, match="does not fit"):
        load(path, ["calls:float32[2,2]"])


def test_inputs_that_are_written_into(tmp_path: Path, make: SimpleNamespace) -> None:
    """The outputs are the program's; that the new value is left out is said."""

    class Adds(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1.0)
            return x * 2

    path = make.save_program(Adds(), (torch.zeros(2, 3),), tmp_path / "m.pt2")
    model = load(path)
    assert any("writes into its input x" in warning for warning in model.warnings)
    got = run_onnx(model, [{"x": np.ones((2, 3), np.float32)}])[0]["output"]
    np.testing.assert_array_equal(got, np.full((2, 3), 4))


def tree(type_name: str, context: Any, *children: dict[str, Any]) -> dict[str, Any]:
    return {"type": type_name, "context": context, "children_spec": list(children)}


def test_outputs_are_called_as_their_tree_calls_them() -> None:
    """Keys, fields and places below a name; none for places alone, for odd words and for names that come twice."""
    leaf = tree(None, None)  # type: ignore[arg-type]
    caches = tree("builtins.list", "null", leaf, leaf)
    cases = [
        (tree("acme.Output", '["logits", "past"]', leaf, caches), ["logits", "past_0", "past_1"]),
        (tree("acme.Data", '[["a", "b"], ["c"]]', leaf, leaf), ["a", "b"]),
        (tree("collections.namedtuple", "mine.P", leaf, leaf), ["u", "v"]),
        (tree("builtins.tuple", "null", leaf, tree("builtins.dict", '["k"]', leaf)), [None, "k"]),
        (tree("builtins.dict", '["a\\u001b[1m", "b"]', leaf, leaf), [None, "b"]),
        (tree("builtins.tuple", "null", *[tree("builtins.dict", '["boxes"]', leaf)] * 2), [None, None]),
        (tree("builtins.dict", "[1, 2]", leaf, leaf), [None, None]),
    ]
    for root, wanted in cases:
        count = len(wanted)
        document = {
            "graph_module": {
                "graph": {"outputs": [{"as_tensor": {"name": f"y{index}"}} for index in range(count)]},
                "signature": {"output_specs": [{"user_output": {}}] * count},
                "module_call_graph": [{"fqn": "", "signature": {"out_spec": json.dumps([1, root])}}],
                "treespec_namedtuple_fields": {"mine.P": {"field_names": ["u", "v"]}},
            }
        }
        assert list(output_labels(document)) == wanted


@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_bfloat16_becomes_float32(cast: str, tmp_path: Path, make: SimpleNamespace) -> None:
    """Weights, casts and inputs, which is said; rtol 2e-2, as bfloat16 rounds to 4e-3."""

    class Narrow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = torch.nn.Linear(8, 4, dtype=torch.bfloat16 if cast == "weights" else torch.float32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
                result: torch.Tensor = self.dense(x).relu()
                return result

    torch.manual_seed(0)
    module, dtype = Narrow().eval(), torch.bfloat16 if cast == "weights" else torch.float32
    dims = ({0: torch.export.Dim("b")},)
    path = make.save_program(module, (torch.randn(2, 8, dtype=dtype),), tmp_path / "m.pt2", dynamic_shapes=dims)
    model = load(path, [f"x:{str(dtype).removeprefix('torch.')}[n,8]"])
    assert [str(spec) for spec in (*model.inputs, *model.outputs)] == ["x:float32[n,8]", "output:float32[n,4]"]
    assert any("computes in bfloat16" in warning for warning in model.warnings)
    x = torch.randn(3, 8)
    with torch.no_grad():
        wanted = module(x.to(dtype)).float().numpy()
    np.testing.assert_allclose(run_onnx(model, [{"x": x.numpy()}])[0]["output"], wanted, rtol=2e-2, atol=2e-2)


def test_trees_that_do_not_fit_the_graph(exported: Path, tmp_path: Path, make: SimpleNamespace) -> None:
    """A description of more inputs than there are is damage, not an input."""
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    two = json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": [leaf, leaf]}])
    with pytest.raises(RejectedModelError, match="describes 2 inputs, and its graph has 1"):
        load(make.rewrite(exported, tmp_path / "a.pt2", {PROGRAM: edit([*SPEC, "in_spec"], two)}))
    with pytest.raises(UnsupportedFormatError, match="not complete"):
        load(make.rewrite(exported, tmp_path / "b.pt2", {PROGRAM: edit([*SPEC, "in_spec"], "7")}))


def test_samples_are_not_read(exported: Path, tmp_path: Path, make: SimpleNamespace) -> None:
    """Classes of a library in the sample inputs keep nobody from reading the program."""
    sample = io.BytesIO()
    torch.save(((Cache([torch.zeros(2)]),), {}), sample)
    changed = make.rewrite(exported, tmp_path / "m.pt2", {"data/sample_inputs/model.pt": sample.getvalue()})
    assert load(changed).inputs[0].name == "x"


class MapsRows(torch.nn.Module):
    """A body for each row, with a weight of its own, two outputs, and another body within a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, sums = map_rows(lambda row: (torch.relu(self.layer(row)), row.sum()), x)
        negated = lambda given: (map_rows(lambda row: -row, given),)  # noqa: E731
        (either,) = torch.cond(x.sum() > 0, negated, lambda given: (given + 1,), (rows,))
        return either, sums


def test_a_map_is_a_scan_that_carries_nothing(tmp_path: Path, make: SimpleNamespace) -> None:
    """Of any number of rows, and within a branch as well; rtol 1e-5."""
    module = MapsRows().eval()
    path = make.save_program(
        module, (torch.randn(4, 6),), tmp_path / "m.pt2", dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    model = load(path)
    assert [node.op_type for node in model.nodes()].count("Scan") == 2
    for count in (2, 5):
        for sign in (1, -1):
            x = sign * torch.rand(count, 6)
            got = run_onnx(model, [{"x": x.numpy()}])[0].values()
            with torch.no_grad():
                rows = torch.relu(module.layer(x))
            expected = (-rows if sign > 0 else rows + 1, x.sum(1))
            for one, wanted in zip(got, expected, strict=True):
                np.testing.assert_allclose(one, wanted.numpy(), rtol=1e-5, atol=1e-6)


class Spectral(torch.nn.Module):
    """A layer of a Fourier neural operator: complex weights, a product of complex tensors, a write into one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 6, 5, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modes = torch.fft.rfft(x)
        mixed = torch.zeros(x.shape[0], 6, modes.shape[-1], dtype=torch.complex64)
        mixed[:, :, :5] = torch.einsum("bix,iox->box", modes[:, :, :5], self.weight)
        return torch.fft.irfft(mixed, n=16)


def test_complex_weights(tmp_path: Path) -> None:
    """Where torch's exporter has no ONNX on complex numbers, it gets real and imaginary parts; any batch, rtol 1e-4."""
    torch.manual_seed(0)
    module = Spectral().eval()
    x = torch.randn(3, 4, 16)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "m.pt2")
    model = load(tmp_path / "m.pt2")
    assert "MatMul" in [node.op_type for node in model.nodes()]
    for given in (x, torch.randn(1, 4, 16)):
        got = run_onnx(model, [{model.inputs[0].name: given.numpy()}])[0]["output"]
        np.testing.assert_allclose(got, module(given).detach().numpy(), rtol=1e-4, atol=1e-5)


class Recurrence(torch.nn.Module):
    """h[t] = a[t] h[t - 1] + b[t], as state-space models have it, and a product for each row."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def joined(left: Any, right: Any) -> Any:
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, state = associative_scan(joined, (a, b), dim=1, combine_mode="generic")
        return state, torch.vmap(torch.dot)(a[:, :, 0], b[:, :, 0])


def test_vmap_and_associative_scan(tmp_path: Path) -> None:
    """Operators on whole batches take the place of calls that open levels, at any batch; rtol 1e-5."""
    batch = torch.export.Dim("batch")
    given = torch.rand(3, 4, 2), torch.rand(3, 4, 2)
    program = torch.export.export(Recurrence(), given, dynamic_shapes=({0: batch}, {0: batch}), strict=True)
    torch.export.save(program, tmp_path / "m.pt2")
    model = load(tmp_path / "m.pt2")
    names = [spec.name for spec in model.inputs]
    for rows in (3, 1, 5):
        a, b = torch.rand(rows, 4, 2), torch.rand(rows, 4, 2)
        state, products = run_onnx(model, [dict(zip(names, (a.numpy(), b.numpy()), strict=True))])[0].values()
        wanted = torch.zeros(rows, 2)
        for step in range(4):
            wanted = a[:, step] * wanted + b[:, step]
            np.testing.assert_allclose(state[:, step], wanted.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(products, (a * b)[:, :, 0].sum(1).numpy(), rtol=1e-5, atol=1e-6)
