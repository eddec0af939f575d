"""compress-client: exit codes, JSON on stdout, options before and after the command, files written."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import code_pb2, error_details_pb2, status_pb2
from modelpress_client.cli.result_files import ResultFiles

RunCli = Callable[..., Any]


def job_error(code: int, reason: str, message: str) -> status_pb2.Status:
    packed = AnyMessage()
    packed.Pack(error_details_pb2.ErrorInfo(domain="modelpress", reason=reason))
    return status_pb2.Status(code=code, message=message, details=[packed])


def test_upload_does_the_main_job(run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path) -> None:
    """One command: model, reports, and a report on stdout."""
    ran = run_cli("--server", fake_server.address, "upload", model_file)
    assert ran.code == 0, ran.err
    assert (tmp_path / "net.optimized.onnx").stat().st_size == 512_000
    assert json.loads((tmp_path / "net.report.json").read_text())["size_ratio"] == 3.642
    assert (tmp_path / "net.report.html").read_text() == "<html></html>"
    for text in ("3.64x smaller", "1.93x faster [1.80, 2.00]", "weight is not constant (conv_3)", "synthetic"):
        assert text in ran.out
    assert "Uploading net.onnx" in ran.err
    assert "\x1b" not in ran.out + ran.err


def test_compress_of_a_file_names_upload(run_cli: RunCli, fake_server: Any, model_file: Path) -> None:
    """It wants a model that the server has."""
    ran = run_cli("compress", model_file, "--server", fake_server.address)
    assert ran.code == 2
    assert f"compress-client upload {model_file}" in ran.err


def test_upload_json(run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path) -> None:
    """stdout is exactly one document of the documented shape; options may stand after the command."""
    ran = run_cli("upload", model_file, "--json", "--server", fake_server.address, "-o", "sub/out.onnx")
    assert ran.code == 0, ran.err
    assert ran.document["model"] == "projects/default/models/m1"
    assert ran.document["job"] == "projects/default/jobs/j2"
    assert ran.document["state"] == "SUCCEEDED"
    assert ran.document["output"] == "sub/out.onnx"
    assert ran.document["report"]["schema_version"] == 1
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == [
        "net.report.html",
        "net.report.json",
        "out.onnx",
    ]


def test_reports_of_two_models_of_one_name(run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path) -> None:
    """The report of another model is kept under a number, with its page, and the newest one has the usual name; that of
    the same model, or of a file that is replaced, is replaced."""

    def upload(original: str, output: str) -> str:
        fake_server.report["original"]["sha256"] = original * 64
        fake_server.report["optimized"]["sha256"] = hashlib.sha256(bytes(range(256)) * 2000).hexdigest()
        ran = run_cli("--server", fake_server.address, "upload", model_file, "-o", output, "--report-dir", "reports")
        assert ran.code == 0, ran.err
        return str(ran.err)

    def kept() -> dict[str, str]:
        reports = sorted((tmp_path / "reports").glob("*.json"))
        return {path.name: json.loads(path.read_text())["original"]["sha256"][0] for path in reports}

    upload("a", "one.onnx")
    assert kept() == {"net.report.json": "a"}
    assert "report of another model" not in upload("a", "same.onnx")
    assert kept() == {"net.report.json": "a"}
    assert "is net.1.report.json now" in upload("b", "two.onnx")
    assert kept() == {"net.1.report.json": "a", "net.report.json": "b"}
    assert (tmp_path / "reports/net.1.report.html").exists()
    assert "they are replaced" in upload("c", "two.onnx")
    assert kept() == {"net.1.report.json": "a", "net.report.json": "c"}
    upload("d", "three.onnx")
    assert kept() == {"net.1.report.json": "a", "net.2.report.json": "c", "net.report.json": "d"}
    for original, output in (("a", "four.onnx"), ("d", "five.onnx"), ("a", "six.onnx")):
        upload(original, output)
    assert kept() == {
        "net.1.report.json": "a",
        "net.2.report.json": "c",
        "net.3.report.json": "d",
        "net.report.json": "a",
    }


def test_models_that_change_leave_no_more_reports_than_models(tmp_path: Path) -> None:
    """Two models of one name, each trained again and again, with an output file of its own."""
    for training in range(4):
        for name in ("a", "b"):
            files = ResultFiles.of("net", tmp_path / f"{name}.onnx", tmp_path)
            original, result = f"{name}{training}", f"result of {name}{training}".encode()
            files.make_room(original, {"model": "", "report.json": ""})
            files.model.write_bytes(result)
            document = {"original": {"sha256": original}, "optimized": {"sha256": hashlib.sha256(result).hexdigest()}}
            files.report_json.write_text(json.dumps(document))
    reports = {path.name: json.loads(path.read_text())["original"]["sha256"] for path in tmp_path.glob("*.json")}
    assert reports == {"net.1.report.json": "a3", "net.report.json": "b3"}


def test_another_model_s_result_is_kept(run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path) -> None:
    """Under the usual name, where nobody named the file: with its report, under one number. A result of the same model
    is replaced, and so is one that was kept before; a file that nothing is known of is kept."""
    optimized = hashlib.sha256(bytes(range(256)) * 2000).hexdigest()
    result, report = tmp_path / "net.optimized.onnx", tmp_path / "net.report.json"

    def upload(original: str) -> str:
        fake_server.report["original"]["sha256"] = original * 64
        fake_server.report["optimized"]["sha256"] = optimized
        ran = run_cli("--server", fake_server.address, "upload", model_file)
        assert ran.code == 0, ran.err
        return str(ran.err)

    def holds(content: bytes) -> None:
        """As if the job whose report is there had given that."""
        result.write_bytes(content)
        known = json.loads(report.read_text())
        known["optimized"]["sha256"] = hashlib.sha256(content).hexdigest()
        report.write_text(json.dumps(known))

    def kept() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("net.*") if path != model_file)

    usual = ["net.optimized.onnx", "net.report.html", "net.report.json"]
    numbered = ["net.1.optimized.onnx", "net.1.report.html", "net.1.report.json"]
    result.write_bytes(b"mine")
    assert "net.optimized.onnx was another file; it is net.1.optimized.onnx now" in upload("a")
    assert (tmp_path / "net.1.optimized.onnx").read_bytes() == b"mine"
    (tmp_path / "net.1.optimized.onnx").unlink()
    holds(b"of a")
    assert "now" not in upload("a")
    assert kept() == usual
    holds(b"of a")
    assert "net.optimized.onnx was another file; it is net.1.optimized.onnx now" in upload("b")
    assert kept() == [*numbered, *usual]
    assert (tmp_path / "net.1.optimized.onnx").read_bytes() == b"of a"
    upload("a")
    holds(b"newer, of a")
    upload("b")
    assert (tmp_path / "net.1.optimized.onnx").read_bytes() == b"newer, of a"
    assert (tmp_path / "net.2.report.json").exists()


def test_download_replaces_nothing_unknown(run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path) -> None:
    """Models, candidates and reports under the usual names: the same is fetched again and again, other files are kept
    under a number, and a file that is named is replaced."""
    at = ("--server", fake_server.address)
    fake_server.report["candidates"] = [{"id": "c1", "name": "float32", "downloadable": True}]
    run_cli("upload", model_file, "--detach", *at)
    run_cli("watch", "j2", *at)
    folder = tmp_path / "got"

    def download(*what: str) -> str:
        ran = run_cli("download", "j2", *what, *at)
        assert ran.code == 0, ran.err
        return str(ran.err)

    for _ in range(2):
        download("--artifact", "all", "-o", "got/")
        download("--candidate", "all", "-o", "got/")
    names = ["net.c1.onnx", "net.optimized.onnx", "net.report.html", "net.report.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        (folder / name).write_text("mine")
    download("--artifact", "all", "-o", "got/")
    assert "net.c1.onnx was another file; it is net.1.c1.onnx now" in download("--candidate", "c1", "-o", "got/")
    assert sorted(path.name for path in folder.glob("net.1.*")) == [name.replace("net.", "net.1.") for name in names]
    assert {path.read_text() for path in folder.glob("net.1.*")} == {"mine"}
    named = tmp_path / "named.onnx"
    named.write_text("mine")
    download("-o", "named.onnx")
    assert named.stat().st_size == 512_000
    assert not list(tmp_path.glob("named.1*"))


def test_later_options_win(run_cli: RunCli, fake_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the command wins over before it, and both over the environment."""
    monkeypatch.setenv("COMPRESS_SERVER", "127.0.0.1:1")
    assert run_cli("--server", fake_server.address, "health").code == 0
    assert run_cli("--server", "127.0.0.1:2", "health", "--server", fake_server.address).code == 0
    monkeypatch.setenv("COMPRESS_SERVER", fake_server.address)
    assert run_cli("health").out == "SERVING\n"


def test_quiet_leaves_the_data(run_cli: RunCli, fake_server: Any, model_file: Path) -> None:
    """--quiet silences stderr alone."""
    ran = run_cli("upload", model_file, "--server", fake_server.address, "--quiet")
    assert ran.err == ""
    assert "smaller" in ran.out


def test_no_compress_and_detach(run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path) -> None:
    """Each prints one name, and writes no file."""
    at = ("--server", fake_server.address)
    assert run_cli("upload", model_file, "--no-compress", *at).out == "projects/default/models/m1\n"
    ran = run_cli("compress", "m1", "--detach", *at)
    assert ran.out == "projects/default/jobs/j2\n"
    assert "cancel projects/default/jobs/j2" in ran.err
    assert run_cli("compress", "m1", "--detach", "--json", *at).document["state"] == "QUEUED"
    assert list(tmp_path.glob("*.optimized.onnx")) == []


def test_recipe_reaches_the_job(run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path) -> None:
    """File, overrides and constraints make the recipe; data and labels go along."""
    (tmp_path / "r.yaml").write_text("version: 1\nsteps:\n- prune: {sparsity: 1e-1}\n- quantize:\n")
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.npy", b"")
    options = ["--recipe", "r.yaml", "--set", "prune.sparsity=0.3", "--set", "quantize.scheme=static"]
    options += ["--max-drop", "0.02", "--metric", "top5", "--data", "data.npz", "--label", "a=b"]
    ran = run_cli("upload", model_file, *options, "--detach", "--server", fake_server.address)
    assert ran.code == 0, ran.err
    (job,) = fake_server.jobs.values()
    recipe = job.spec.recipe
    assert recipe.steps[0].prune.sparsity == 0.3
    assert recipe.steps[1].quantize.scheme == "static"
    assert (recipe.constraints.metric, recipe.constraints.max_drop) == ("top5", 0.02)
    assert job.spec.data.sha256 in fake_server.blobs
    assert dict(job.labels) == {"a": "b"}


def test_bad_recipe_is_refused_before_the_upload(
    run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path
) -> None:
    """All violations at once, each with its path, and no byte was sent."""
    (tmp_path / "r.yaml").write_text("version: 1\nsteps:\n- fuse: {}\n- prune: {sparsity: 1.4}\nbenchmrk: {}\n")
    ran = run_cli("upload", model_file, "--recipe", "r.yaml", "--json", "--server", fake_server.address)
    assert ran.code == 2
    assert ran.document["error"]["reason"] == "INVALID_FIELDS"
    assert "steps[1].prune.sparsity: 1.4 is not in [0, 1)" in ran.err
    assert [item["field"] for item in ran.document["error"]["details"]["violations"]] == [
        "steps[1].prune.sparsity",
        "benchmrk",
    ]
    assert fake_server.seen == []


def test_target(run_cli: RunCli, fake_server: Any, model_file: Path) -> None:
    """cpu is taken; what the server cannot measure on is refused before the upload, with the reason."""
    at = ("--server", fake_server.address)
    ran = run_cli("upload", model_file, "--target", "cuda", *at)
    assert ran.code == 2
    assert "measures on cpu alone" in ran.err
    assert "modelpress[cuda]" in ran.err
    assert fake_server.seen == ["GetServerInfo"]
    ran = run_cli("upload", model_file, "--target", "openvino", *at)
    assert ran.code == 2
    assert "modelpress[openvino]" in ran.err
    assert run_cli("upload", model_file, "--target", "cpu", "--detach", *at).code == 0
    (job,) = fake_server.jobs.values()
    assert job.spec.recipe.target.device == "cpu"
    assert run_cli("upload", model_file, "--target", "toaster", *at).code == 2


def test_unknown_preset(run_cli: RunCli, fake_server: Any, model_file: Path) -> None:
    """The presets are the server's; a near miss is named."""
    ran = run_cli("upload", model_file, "--recipe", "defalt", "--server", fake_server.address)
    assert ran.code == 2
    assert "Did you mean 'default'?" in ran.err


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("UNSUPPORTED_FORMAT", 2),
        ("MODEL_REJECTED", 2),
        ("INVALID_DATA", 2),
        ("MODEL_NOT_RUNNABLE", 2),
        ("WORKER_TIMEOUT", 1),
        ("WORKER_OUT_OF_MEMORY", 1),
        ("INTERNAL", 1),
    ],
)
def test_failed_jobs(run_cli: RunCli, fake_server: Any, model_file: Path, reason: str, code: int) -> None:
    """2 where the input is the cause, 1 otherwise; one document on stdout."""
    fake_server.script.job_status = job_error(code_pb2.INVALID_ARGUMENT, reason, "It did not work; do this.")
    ran = run_cli("upload", model_file, "--json", "--server", fake_server.address)
    assert ran.code == code
    assert ran.document["error"]["reason"] == reason
    assert ran.document["error"]["details"]["job"] == "projects/default/jobs/j2"
    assert "Error: It did not work; do this." in ran.err


def test_constraint_not_met(run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path) -> None:
    """Exit 6, and the result is there all the same."""
    fake_server.script.constraints_met = False
    ran = run_cli("upload", model_file, "--max-drop", "0.01", "--json", "--server", fake_server.address)
    assert ran.code == 6
    assert ran.document["report"]["constraints"]["met"] is False
    assert "A constraint is not met: " in ran.err
    assert "0.03 is more than 0.01" in ran.err
    assert (tmp_path / "net.optimized.onnx").exists()
    assert run_cli("watch", "j2", "--server", fake_server.address).code == 6


def test_authentication(run_cli: RunCli, fake_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 3 without the token; the environment and the option bring it."""
    fake_server.script.token = "secret"
    at = ("--server", fake_server.address)
    ran = run_cli("jobs", "--json", *at)
    assert ran.code == 3
    assert ran.document["error"]["reason"] == "UNAUTHENTICATED"
    assert run_cli("--token", "secret", "jobs", *at).code == 0
    monkeypatch.setenv("COMPRESS_TOKEN", "secret")
    assert run_cli("jobs", *at).code == 0


def test_timeout(run_cli: RunCli, fake_server: Any, model_file: Path) -> None:
    """Exit 5, and how to follow or stop the job that goes on."""
    fake_server.script.hang_job = True
    for limit_s in (1, 8, 64):
        ran = run_cli("upload", model_file, "--timeout", limit_s, "--json", "--server", fake_server.address)
        assert ran.code == 5
        if ran.document["error"]["details"]:
            break  # else the machine was too busy to come as far as the job
    job = ran.document["error"]["details"]["job"]
    assert job in fake_server.jobs
    assert f"compress-client cancel {job}" in ran.err


def test_health(run_cli: RunCli, fake_server: Any) -> None:
    """0 only when serving."""
    assert run_cli("health", "--json", "--server", fake_server.address).document["status"] == "SERVING"
    fake_server.script.serving = 2
    ran = run_cli("health", "--server", fake_server.address)
    assert ran.code == 4
    assert "NOT_SERVING" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["upload"],
        ["upload", "/does/not/exist"],
        ["--timeout", "-1", "jobs"],
        ["--project", "a/b", "jobs"],
        ["--server", "no port", "jobs"],
        ["job", "projects/x/models/y"],
        ["models", "--label", "=x"],
        ["models", "--state", "running"],
        ["--cert", __file__, "jobs"],
        ["--ca", __file__, "jobs"],
    ],
)
def test_wrong_usage(run_cli: RunCli, arguments: list[str]) -> None:
    """Exit 2, one paragraph on stderr, one document on stdout with --json, never a traceback."""
    ran = run_cli(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("Error: ")
    assert "Traceback" not in ran.err
    with_json = run_cli("--json", *arguments)
    assert with_json.code == 2
    assert with_json.document["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--timeout", "abc", "jobs"], "'abc' is not a valid number"), (["jobs", "--limit", "x"], "whole number")],
)
def test_numbers_are_called_numbers(run_cli: RunCli, arguments: list[str], said: str) -> None:
    """Not float ranges: the words are for people."""
    assert said in run_cli(*arguments).err


def test_refuses_early_what_needs_the_users_code(run_cli: RunCli, fake_server: Any, tmp_path: Path) -> None:
    """A state dict and a pickled module are refused with the way out before the server is asked."""
    (tmp_path / "m.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    # As torch.save wrote before version 1.6: magic number, protocol, system, object.
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    (tmp_path / "m.pt").write_bytes(magic + b"\x80\x02M\xe9\x03." + b"\x80\x02}." + b"\x80\x02cfoo\nBar\n.")
    at = ("--server", fake_server.address)
    ran = run_cli("upload", "m.safetensors", *at)
    assert (ran.code, "--architecture" in ran.err) == (2, True)
    ran = run_cli("upload", "m.pt", *at)
    assert (ran.code, "--trust-pickle" in ran.err) == (2, True)
    ran = run_cli("upload", "m.pt", "--trust-pickle", *at)
    assert (ran.code, "--input" in ran.err) == (2, True)
    assert fake_server.seen == []


def test_a_slash_at_the_end_means_a_folder(run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path) -> None:
    """Also where it is not there yet; a file of that name is none."""
    at = ("--server", fake_server.address)
    assert run_cli("upload", model_file, "-o", "new/results/", *at).code == 0
    assert {path.name for path in (tmp_path / "new" / "results").iterdir()} >= {"net.optimized.onnx", "net.report.json"}
    (job,) = fake_server.jobs
    assert run_cli("download", job, "-o", "other/", *at).code == 0
    assert (tmp_path / "other" / "net.optimized.onnx").is_file()
    ran = run_cli("download", job, "-o", "net.onnx/", *at)
    assert (ran.code, "cannot be made" in ran.err) == (2, True)


def test_a_result_that_cannot_be_written_is_still_there(
    run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path
) -> None:
    """The disk may be full when a long job ends: the message says where the result is."""
    (tmp_path / "net.report.json").mkdir()
    ran = run_cli("upload", model_file, "--server", fake_server.address, "--json")
    (job,) = fake_server.jobs
    assert ran.code == 2
    assert ran.document["error"]["details"]["job"] == job
    assert f"compress-client download {job} -o FOLDER/ --server {fake_server.address}" in ran.err


def test_output_is_never_the_model(run_cli: RunCli, model_file: Path) -> None:
    """The original must survive."""
    ran = run_cli("upload", model_file, "-o", model_file)
    assert ran.code == 2
    assert "is the model itself" in ran.err


def test_lists(run_cli: RunCli, fake_server: Any, model_file: Path) -> None:
    """Lists are newest first, paged through, filtered by the server, and limited."""
    at = ("--server", fake_server.address)
    assert "No jobs" in run_cli("jobs", *at).err
    for _ in range(5):
        run_cli("upload", model_file, "--no-compress", *at)
    names = [model["name"] for model in run_cli("models", "--json", *at).document["models"]]
    assert names == [f"projects/default/models/m{index}" for index in (5, 4, 3, 2, 1)]
    assert len(run_cli("models", "--limit", "3", "--json", *at).document["models"]) == 3
    run_cli("models", "--state", "active", "--label", 'k=v"w', *at)
    assert fake_server.seen[-1] == 'ListModels state = ACTIVE AND labels.k = "v\\"w"'
    assert "net.onnx" in run_cli("models", *at).out


def test_usage_and_uploads(run_cli: RunCli, fake_server: Any) -> None:
    """What a project has, and its unfinished uploads, which can be cancelled one by one or all."""
    at = ("--server", fake_server.address)
    shown = run_cli("usage", *at).out
    assert "2 MB in 3 files" in shown
    assert "1 of 10, kept" in shown
    assert run_cli("usage", "--json", *at).document["models"] == 1
    assert [line.split()[0] for line in run_cli("uploads", *at).out.splitlines()[1:]] == ["u2", "u1"]
    run_cli("uploads", "--cancel", "u1", *at)
    assert fake_server.seen[-1] == "CancelUpload projects/default/uploads/u1"
    run_cli("uploads", "--cancel", "all", *at)
    assert fake_server.seen[-2:] == [f"CancelUpload projects/default/uploads/u{number}" for number in (2, 1)]


def test_labels(run_cli: RunCli, fake_server: Any, model_file: Path) -> None:
    """Jobs and models get labels and lose them, also while they change; pin is one of them; --priority is sent."""
    at = ("--server", fake_server.address)
    run_cli("upload", model_file, "--detach", "--label", "team=a", "--priority", "-5", *at)
    job = fake_server.jobs["projects/default/jobs/j2"]
    assert job.spec.priority == -5
    fake_server.script.changes_meanwhile = 3
    assert run_cli("label", "j2", "kind=test", "team=b", *at).out == "kind=test\nteam=b\n"
    assert run_cli("label", "j2", "--remove", "kind", "--json", *at).document == {
        "name": "projects/default/jobs/j2",
        "labels": {"team": "b"},
    }
    assert run_cli("pin", "m1", *at).out == "pin=yes\nteam=a\n"
    assert fake_server.models["projects/default/models/m1"].labels["pin"] == "yes"
    assert run_cli("pin", "m1", "--undo", *at).out == "team=a\n"
    fake_server.script.changes_meanwhile = 1000
    ran = run_cli("label", "j2", "a=b", *at)
    assert (ran.code, "It has changed" in ran.err) == (2, True)
    assert run_cli("label", "j2", "no label", *at).code == 2
    assert run_cli("upload", model_file, "--priority", "101", *at).code == 2


def test_one_job(run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path) -> None:
    """job, watch, logs, report, download, cancel, delete take the last part of a name."""
    at = ("--server", fake_server.address)
    run_cli("upload", model_file, "--detach", *at)
    assert run_cli("job", "j2", "--json", *at).document["state"] == "QUEUED"
    assert run_cli("download", "j2", *at).code == 2  # not yet
    assert run_cli("watch", "j2", *at).out == "projects/default/jobs/j2 SUCCEEDED\n"
    assert "line 2" in run_cli("logs", "j2", *at).out
    assert len(run_cli("logs", "j2", "--json", *at).document["lines"]) == 3
    assert run_cli("report", "j2", "--json", *at).document["size_ratio"] == 3.642
    assert json.loads(run_cli("report", "j2", "--format", "json", *at).out)["size_ratio"] == 3.642
    assert run_cli("report", "j2", "--format", "html", *at).out == "<html></html>\n"
    assert run_cli("report", "j2", "--format", "markdown", *at).out.startswith("# Compression report")
    layers = run_cli("report", "j2", "--layers", *at).out
    assert all(word in layers for word in ("conv_3", "QLinearConv", "12.5%", "2.0 times as fast"))
    assert "fc" not in layers  # it has no time of its own
    assert len(run_cli("report", "j2", "--layers", "--json", *at).document["layers"]) == 2
    assert run_cli("report", "j2", "--layers", "--format", "html", *at).code == 2
    assert run_cli("download", "j2", "--artifact", "all", "-o", "got/", *at).code == 0
    assert sorted(path.name for path in (tmp_path / "got").iterdir()) == [
        "net.optimized.onnx",
        "net.report.html",
        "net.report.json",
    ]
    assert run_cli("cancel", "j2", *at).code == 0
    assert run_cli("delete", "j2", *at).out == "Deleted projects/default/jobs/j2\n"
    assert run_cli("delete", "m1", *at).out == "Deleted projects/default/models/m1\n"
    ran = run_cli("delete", "m1", *at)
    assert (ran.code, "neither a job nor a model" in ran.err) == (2, True)


def test_what_is_no_data_is_refused_before_the_upload(
    run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path
) -> None:
    """A large model is not sent for a slip in the name of another file."""
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY")
    for option in ("--data", "--eval"):
        ran = run_cli("upload", model_file, option, "x.npy", "--server", fake_server.address)
        assert (ran.code, "x.npy is not an .npz file" in ran.err) == (2, True)
    assert not fake_server.models


def test_inspect(run_cli: RunCli, fake_server: Any, model_file: Path) -> None:
    """A file or a model; nothing is compressed."""
    at = ("--server", fake_server.address)
    ran = run_cli("inspect", model_file, *at)
    assert "x:float32[N,4]" in ran.out
    assert "It is small." in ran.out
    assert run_cli("inspect", "m1", "--json", *at).document["inspection"]["parameter_count"] == 24_600
    ran = run_cli("inspect", "folder/net.onnx", *at)
    assert (ran.code, "There is no file 'folder/net.onnx'" in ran.err) == (2, True)
    assert fake_server.jobs == {}


def test_recipes_and_info(run_cli: RunCli, fake_server: Any, tmp_path: Path) -> None:
    """A preset printed as YAML is a file that --recipe takes."""
    at = ("--server", fake_server.address)
    assert "fuse → quantize" in run_cli("recipes", *at).out
    assert run_cli("recipes", "--json", *at).document["presets"][0]["recipe"]["version"] == 1
    (tmp_path / "copy.yaml").write_text(run_cli("recipes", "default", *at).out)
    from modelpress_client.recipes import build, load_yaml

    assert build(load_yaml(tmp_path / "copy.yaml")).steps[1].quantize.scheme == "auto"
    assert "Version" in run_cli("info", *at).out
    assert run_cli("info", "--json", *at).document["version"] == "0.1.0"


def test_local_without_the_server_package(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The exact pip line is printed."""
    from modelpress_client import local

    monkeypatch.setattr(local, "SERVER_PACKAGES", ("modelpress_server", "a_package_that_is_missing"))
    ran = run_cli("--local", "--data-dir", tmp_path / "data", "info")
    assert ran.code == 2
    assert "pip install 'modelpress[server]'" in ran.err


def test_local_and_a_server_are_two_places(run_cli: RunCli) -> None:
    """Asking for both is refused: the job would run where it was not meant to."""
    ran = run_cli("--local", "--server", "models.example:50051", "info")
    assert ran.code == 2
    assert "leave out --server, or --local" in ran.err


def test_local_uses_a_running_server(
    run_cli: RunCli, fake_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """server.json names a server that answers: it is used, and not ended."""
    monkeypatch.setattr("modelpress_client.local.PROBE_TIMEOUT_S", 120.0)
    (tmp_path / "server.json").write_text(json.dumps({"address": fake_server.address, "pid": os.getpid()}))
    assert run_cli("--local", "--data-dir", tmp_path, "health").out == "SERVING\n"
    assert run_cli("--server", fake_server.address, "health").code == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run_cli: RunCli, shell: str) -> None:
    """The script calls back into the program."""
    assert "_COMPRESS_CLIENT_COMPLETE" in run_cli("completion", shell).out


# --- as a process ------------------------------------------------------------------------------------------------


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "NO_COLOR": "1"}
    # Where the tests run in the background, their children begin with SIGINT ignored; a terminal's do not.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", f"{code}from modelpress_client.cli import main; main()", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_advised_commands_repeat_what_was_given(
    run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path
) -> None:
    """They run as they are: the same files and server, the goal that is advised, and no limit that it leaves."""
    with zipfile.ZipFile(tmp_path / "a b.npz", "w") as archive:
        archive.writestr("x.npy", b"")
    upload = "compress-client upload MODEL --data FILE.npz"
    fake_server.report["advice"] = [
        {"text": "More.", "command": f"{upload} --eval FILE.npz --max-drop 0.01 --goal fastest"},
        {"text": "Unbounded.", "command": f"{upload} --goal smallest"},
    ]
    at = f"--server {fake_server.address}"
    (tmp_path / "r.yaml").write_text("version: 1\ngoal: {objective: balanced}\n")
    given = [
        "--recipe",
        "r.yaml",
        "--data",
        tmp_path / "a b.npz",
        "--max-drop",
        "1%",
        "--max-size=5MB",
        "--timeout",
        90,
    ]
    more = ["--goal", "smallest", "--set", "goal.techniques=[fuse]", "--set", "benchmark.rounds=9", "-o", "out.onnx"]
    ran = run_cli(*at.split(), "upload", model_file, *given, *more, "--json")
    advice, unbounded = ran.document["advice"]
    assert "--max-drop" not in unbounded["command"]
    assert advice["command"] == (
        f"compress-client upload {model_file} {at} --recipe r.yaml --data '{tmp_path}/a b.npz' --max-drop 1% "
        "--output out.onnx --set benchmark.rounds=9 --eval FILE.npz --goal fastest"
    )
    model = ran.document["model"]
    ran = run_cli("compress", model, *at.split(), "--json")
    assert ran.document["advice"][0]["command"].startswith(f"compress-client compress {model} {at} --data FILE.npz")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(fake_server: Any, model_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Exit 130; the job goes on, and the text says how to follow and to cancel it."""
    fake_server.script.hang_job = True
    process = start("upload", str(model_file), "--json", "--server", fake_server.address, cwd=tmp_path)
    while not any(call.startswith("WatchJob") for call in fake_server.seen):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "projects/default/jobs/j2 goes on" in err
    assert f"compress-client cancel projects/default/jobs/j2 --server {fake_server.address}" in err
    assert "Traceback" not in err
    assert json.loads(out)["error"]["details"] == {"job": "projects/default/jobs/j2"}


def imported_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {line.split(".")[0] for line in run.stdout.splitlines()}


def test_imports_are_light() -> None:
    """The package alone loads nothing; the client loads no numpy, torch or onnx; help loads neither grpc nor rich."""
    heavy = {"numpy", "torch", "onnx", "onnxruntime", "modelpress_compression", "modelpress_server"}
    assert not imported_by("import modelpress_client") & {*heavy, "grpc", "google", "rich", "yaml"}
    assert not imported_by("from modelpress_client import Client, AsyncClient, Report") & heavy
    help_text = "from modelpress_client.cli import main\ntry: main(['upload', '--help'])\nexcept SystemExit: pass"
    assert not imported_by(help_text) & {*heavy, "grpc", "google", "rich", "yaml", "modelpress_protos"}


def test_the_family_of_a_model(run_cli: RunCli, fake_server: Any, model_file: Path, tmp_path: Path) -> None:
    """candidates lists, plots and compares; download takes one of them, or all."""
    at = ("--server", fake_server.address)
    speed = {"low": 0.9, "high": 2.2}
    fake_server.report["candidates"] = [
        {"id": "c1", "name": "fuse", "size_bytes": 9000, "speedup": speed | {"median": 1.0}, "chosen": False,
         "pareto": True, "reason": "another is better", "downloadable": True},
        {"id": "c2", "name": "static", "size_bytes": 3000, "speedup": speed | {"median": 2.0}, "chosen": True,
         "pareto": True, "reason": "", "downloadable": True, "drop": 0.001},
    ]  # fmt: skip
    run_cli("upload", model_file, *at)
    ran = run_cli("candidates", "j2", *at)
    lines = ran.out.splitlines()
    # The plot: the larger and slower one at the top right, the other at a third of the height and half of the width.
    first = next(number for number, line in enumerate(lines) if "│" in line and line.rstrip().endswith("1"))
    second = next(number for number, line in enumerate(lines) if "│" in line and line.rstrip().endswith("2"))
    assert first < second
    assert lines[second].index("2") < lines[first].rindex("1")
    assert "static (chosen)" in ran.out
    assert "another is better" in ran.out
    assert [row["id"] for row in run_cli("candidates", "j2", "--json", *at).document["candidates"]] == ["c1", "c2"]
    compared = run_cli("candidates", "j2", "--compare", "c1", "c2", *at).out
    assert compared.count("1.00x") == compared.count("1.00x [0.90, 2.20]") == 1
    assert run_cli("candidates", "j2", "--compare", "c1", "c9", *at).code == 2
    assert run_cli("download", "j2", "--candidate", "all", "-o", "family/", *at).code == 0
    assert {path.name: path.read_text() for path in (tmp_path / "family").iterdir()} == {
        "net.c1.onnx": "c1",
        "net.c2.onnx": "c2",
    }
    assert run_cli("download", "j2", "--candidate", "c2", "-o", "one.onnx", *at).code == 0
    assert (tmp_path / "one.onnx").read_text() == "c2"
    ran = run_cli("download", "j2", "--candidate", "c7", *at)
    assert (ran.code, "there are c1, c2" in ran.err) == (2, True)
    assert run_cli("download", "j2", "--candidate", "c1", "--artifact", "all", *at).code == 2
