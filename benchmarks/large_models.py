"""Memory and time that large models take: loaded, compressed, written, and sent to a server and back.

    python benchmarks/large_models.py [--size-mb 100 1100 2500 6000] [--recipe fuse ...] [--server] [--directory DIR]

The models are transformers in the manner of Llama with random weights, written layer by layer: one file up to 1.5 GB,
external data beyond. Each recipe runs in a process of its own, which loads the model, compresses it and writes the
result; with `--server`, a `compress-server` and the command `compress-client` do, and each process counts by itself.

Memory is what a process holds of its own (RssAnon and RssShmem of /proc/PID/status) at its peak, polled. Pages of
mapped files are the kernel's cache and shown apart: it takes them back when others need the room. Seconds are of the
wall clock, and of all processors for a run without a server. Demanded: at most 1.5 times the model plus 1 GB. Models
and results are removed afterwards; the folder needs five times the largest model.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import psutil
import yaml
from onnx import TensorProto, helper
from sampling import Sampled
from server_process import running_server

MB, GB = 10**6, 10**9
BOUND_FACTOR, BOUND_BYTES = 1.5, GB
SINGLE_FILE_BYTES = 1.5 * GB
RECIPES = {
    "load": None,
    "fuse": "[{fuse: {}}]",
    "weight_only 8": "[{quantize: {scheme: weight_only, weights: int8}}]",
    "weight_only 4": "[{quantize: {scheme: weight_only, weights: int4}}]",
    "dynamic": "[{quantize: {scheme: dynamic}}]",
    "default": "",
}


@dataclass(frozen=True)
class Shape:
    """Of a network: `size_bytes` of its weights come out nearly right by the number of its layers."""

    hidden: int
    inner: int
    vocabulary: int
    layers: int

    @classmethod
    def of_size(cls, size_bytes: int) -> Shape:
        hidden = next(
            width for width, least in ((3072, 5e9), (2048, 2e9), (1536, 0.8e9), (512, 0)) if size_bytes > least
        )
        inner, vocabulary = hidden * 11 // 4, 8 * hidden
        layer_bytes = 4 * (4 * hidden**2 + 3 * hidden * inner)
        return cls(hidden, inner, vocabulary, max(1, round((size_bytes - 8 * hidden * vocabulary) / layer_bytes)))


class Writer:
    """Nodes are collected; weights go to the disk at once."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path, self.shape = path, shape
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.file = path.with_name(path.name + ".data").open("wb")
        self.random = np.random.default_rng(0)

    def weight(self, name: str, *dims: int, scale: float | None = None) -> str:
        """Random numbers, of such a size that activations neither grow nor vanish; `scale` None: ones."""
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
        self.file.seek(-self.file.tell() % 65536, 1)
        length = 4 * int(np.prod(dims))
        location = {"location": self.file.name.rsplit("/", 1)[-1], "offset": self.file.tell(), "length": length}
        for key, value in location.items():
            tensor.external_data.add(key=key, value=str(value))
        for start in range(0, dims[0], 256):
            rows = (min(256, dims[0] - start), *dims[1:])
            made = np.ones(rows, np.float32) if scale is None else self.random.standard_normal(rows, np.float32) * scale
            self.file.write(made.astype(np.float32).data)
        self.tensors.append(tensor)
        return name

    def node(self, op_type: str, *inputs: str, **attributes: object) -> str:
        output = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: np.ndarray) -> str:
        self.tensors.append(onnx.numpy_helper.from_array(values, name))
        return name

    def norm(self, x: str, name: str) -> str:
        mean = self.node("ReduceMean", self.node("Mul", x, x), axes=[-1])
        root = self.node("Sqrt", self.node("Add", mean, "epsilon"))
        return self.node("Mul", self.node("Div", x, root), self.weight(name, self.shape.hidden))

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        return self.node("MatMul", x, self.weight(name, inputs, outputs, scale=inputs**-0.5))

    def heads(self, x: str, name: str, perm: list[int]) -> str:
        hidden = self.shape.hidden
        return self.node("Transpose", self.node("Reshape", self.linear(x, name, hidden, hidden), "split"), perm=perm)

    def layer(self, x: str, prefix: str) -> str:
        hidden, inner = self.shape.hidden, self.shape.inner
        normed = self.norm(x, f"{prefix}.norm1")
        query, value = (self.heads(normed, f"{prefix}.{name}", [0, 2, 1, 3]) for name in "qv")
        key = self.heads(normed, f"{prefix}.k", [0, 2, 3, 1])
        scores = self.node("Softmax", self.node("Mul", self.node("MatMul", query, key), "root"), axis=-1)
        mixed = self.node("Transpose", self.node("MatMul", scores, value), perm=[0, 2, 1, 3])
        x = self.node("Add", x, self.linear(self.node("Reshape", mixed, "merge"), f"{prefix}.o", hidden, hidden))
        normed = self.norm(x, f"{prefix}.norm2")
        gate = self.linear(normed, f"{prefix}.gate", hidden, inner)
        gated = self.node(
            "Mul",
            self.node("Mul", gate, self.node("Sigmoid", gate)),
            self.linear(normed, f"{prefix}.up", hidden, inner),
        )
        return self.node("Add", x, self.linear(gated, f"{prefix}.down", inner, hidden))

    def write(self) -> None:
        shape = self.shape
        self.constant("epsilon", np.float32(1e-6))
        self.constant("root", np.float32(64**-0.5))
        self.constant("split", np.asarray([0, 0, -1, 64]))
        self.constant("merge", np.asarray([0, 0, shape.hidden]))
        x = self.node("Gather", self.weight("embedding", shape.vocabulary, shape.hidden, scale=1.0), "ids")
        for number in range(shape.layers):
            x = self.layer(x, f"layer{number}")
        self.linear(self.norm(x, "norm"), "head", shape.hidden, shape.vocabulary)
        self.nodes[-1].output[0] = "logits"
        self.file.close()
        graph = helper.make_graph(
            self.nodes,
            "transformer",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", shape.vocabulary])],
            self.tensors,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), self.path)


def make_model(path: Path, size_bytes: int) -> list[Path]:
    """Its files; this process never holds more than a part of a weight, unless all are to go into one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Writer(path, Shape.of_size(size_bytes)).write()
    data = path.with_name(path.name + ".data")
    if size_bytes > SINGLE_FILE_BYTES:
        return [path, data]
    from modelpress_compression import load

    whole = path.with_name("single.onnx")
    load(path).save(whole)
    data.unlink()
    whole.replace(path)
    return [path]


@dataclass
class Peak(Sampled):
    """The most that each of some processes, and their children, held: `own` of its own, `files` of mapped files."""

    roots: dict[str, int]
    own: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    def look(self) -> None:
        for name, pid in self._processes():
            own, files = held_bytes(pid)
            self.own[name] = max(self.own.get(name, 0), own)
            self.files[name] = max(self.files.get(name, 0), files)

    def _processes(self) -> Iterator[tuple[str, int]]:
        for name, pid in self.roots.items():
            yield name, pid
            try:
                children = psutil.Process(pid).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            yield from ((f"{name}'s child", child.pid) for child in children)


def held_bytes(pid: int) -> tuple[int, int]:
    """Of its own, and of mapped files; nothing where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0), sizes.get("RssFile", 0)


def recipe_text(name: str) -> str:
    steps = RECIPES[name]
    asked = f"steps: {steps}" if steps else "goal: {objective: balanced}"
    return f"{{version: 1, {asked}, benchmark: {{rounds: 10}}}}"


def row(size_bytes: int, what: str, peak: Peak, time_s: str, result: str) -> bool:
    """Prints one row of the table; whether each process kept within the bound."""
    bound = BOUND_FACTOR * size_bytes + BOUND_BYTES
    own = "; ".join(f"{name} {held / GB:.2f}" for name, held in peak.own.items())
    files = "; ".join(f"{held / GB:.2f}" for held in peak.files.values())
    holds = max(peak.own.values(), default=0) <= bound
    verdict = "holds" if holds else "MISSED"
    cells = (f"{size_bytes / MB:.0f}", what, own, files, f"{bound / GB:.2f}", verdict, time_s, result)
    print(f"| {' | '.join(cells)} |", flush=True)
    return holds


def children_s() -> float:
    """Processor time of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compress_alone(path: Path, size_bytes: int, name: str) -> bool:
    """One recipe in a process of its own."""
    folder = path.parent / "result"
    began, before_s = time.monotonic(), children_s()
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", str(path), name, str(folder)], stdout=subprocess.PIPE, text=True
    )
    with Peak({"engine": child.pid}) as peak:
        said = child.communicate()[0].strip().splitlines()
    result = said[-1] if child.returncode == 0 and said else f"FAILED ({child.returncode})"
    shutil.rmtree(folder, ignore_errors=True)
    time_s = f"{time.monotonic() - began:.0f} ({children_s() - before_s:.0f})"
    return row(size_bytes, name, peak, time_s, result) and child.returncode == 0


def run_child(path: Path, name: str, folder: Path) -> None:
    """Loads, compresses, writes; prints what came of it."""
    from modelpress_compression import Recipe, compress, load

    model = load(path)
    if name == "load":
        print("loaded")
        return
    recipe = Recipe.from_dict(yaml.safe_load(recipe_text(name)))
    result = compress(
        model, recipe, work_directory=path.parent, on_log=lambda severity, text: print(text, file=sys.stderr)
    )
    result.write(folder)
    size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    print(f"{size / MB:.0f} MB: {result.report['verdict']}")


def compress_remotely(path: Path, size_bytes: int, name: str) -> bool:
    """Upload, compression and download by a server and a client."""
    recipe, target = path.with_name("recipe.yaml"), path.with_name("downloaded.onnx")
    recipe.write_text(recipe_text(name))
    with running_server(path.parent / "server", "--worker-start", "exec") as server:
        command = [sys.executable, "-m", "modelpress_client", "--server", server.address, "-q", "upload", str(path)]
        began = time.monotonic()
        client = subprocess.Popen(
            [*command, "--recipe", str(recipe), "-o", str(target), "--allow-damage"], stdout=subprocess.DEVNULL
        )
        with Peak({"client": client.pid, "server": server.process.pid}) as peak:
            code = client.wait()
        time_s = f"{time.monotonic() - began:.0f}"
    sizes = [file.stat().st_size for file in path.parent.glob("downloaded.onnx*")]
    shutil.rmtree(path.parent / "server")
    for file in path.parent.glob("downloaded*"):
        file.unlink()
    result = f"{sum(sizes) / MB:.0f} MB" if code == 0 else f"FAILED ({code})"
    return row(size_bytes, f"server, {name}", peak, time_s, result) and code == 0


def main() -> int:
    """1 where a process took more than is permitted, or a run failed."""
    if sys.argv[1:2] == ["--child"]:
        run_child(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, nargs="+", default=[100, 1100, 2500, 6000])
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--server", nargs="+", choices=list(RECIPES)[1:], default=[], metavar="RECIPE")
    parser.add_argument("--directory", type=Path)
    asked = parser.parse_args()
    print("| model, MB | recipe | held, GB | mapped files, GB | bound, GB | | seconds (CPU) | result |")
    print("|---|---|---|---|---|---|---|---|")
    holds = True
    for size_mb in asked.size_mb:
        with tempfile.TemporaryDirectory(prefix="modelpress-large-", dir=asked.directory) as folder:
            path = Path(folder) / "model" / "model.onnx"
            size_bytes = sum(file.stat().st_size for file in make_model(path, size_mb * MB))
            for name in asked.recipe:
                holds &= compress_alone(path, size_bytes, name)
            for name in asked.server:
                holds &= compress_remotely(path, size_bytes, name)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
