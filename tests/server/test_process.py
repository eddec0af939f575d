"""`compress-server` as a process: command line, environment, configuration file, signals, what it imports."""

from __future__ import annotations

import json
import signal
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner
from modelpress_server.cli import command
from modelpress_server.config import GIB, MIB, Settings, SettingsError
from server_process import launched


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_light_and_exits_0(tmp_path: Path, number: signal.Signals) -> None:
    """One line on stdout; exit 0 on SIGTERM and SIGINT; under 100 MiB, without torch, onnx, onnxruntime and numpy."""
    with launched("--data-dir", str(tmp_path), "--workers", "1") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on 127.0.0.1:")
        address = line.removeprefix("listening on ").strip()
        announced = json.loads((tmp_path / "server.json").read_text())
        assert announced == {"address": address, "pid": process.pid}
        process.send_signal(number)
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr
        report = json.loads(stdout)
        assert set(report["heavy"]) <= {"alembic"}
        assert report["rss_kib"] < 100 * 1024
        assert "Traceback" not in stderr
    assert not (tmp_path / "server.json").exists()


def test_a_migrated_database_starts_without_alembic(tmp_path: Path) -> None:
    """The second start on a folder does not pay for the migrations."""
    for expected in (["alembic"], []):
        with launched("--data-dir", str(tmp_path)) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.terminate()
            assert json.loads(process.communicate()[0])["heavy"] == expected


def test_a_wrong_setting_is_one_paragraph(tmp_path: Path) -> None:
    """Exit 2 and a message that says what to do; no traceback."""
    with launched("--data-dir", str(tmp_path), "--tls-cert", "x") as process:
        stdout, stderr = process.communicate()
        assert (process.returncode, "listening" in stdout) == (2, False)
        assert "tls_cert and tls_key go together" in stderr
        assert "Traceback" not in stderr


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that the command would serve with."""
    found: list[Settings] = []

    async def serve(settings: Settings) -> None:
        found.append(settings)

    monkeypatch.setattr("modelpress_server.cli._serve", serve)
    return found


def test_command_line_over_environment_over_file(tmp_path: Path, seen: list[Settings]) -> None:
    """Every source sets every option; the nearer one wins."""
    config = tmp_path / "server.toml"
    config.write_text('workers = 5\nmax_blob_bytes = "3GiB"\nblob_ttl_s = 7\nsandbox = "off"\ninsecure = true\n')
    arguments = ["--config", str(config), "--workers", "7"]
    environment = {"COMPRESS_SERVER_WORKERS": "6", "COMPRESS_SERVER_BLOB_TTL_S": "8"}
    result = CliRunner().invoke(command, arguments, env=environment)
    assert result.exit_code == 0, result.output
    settings = seen[0]
    assert (settings.workers, settings.blob_ttl_s, settings.max_blob_bytes) == (7, 8.0, 3 * GIB)
    assert (settings.sandbox, settings.insecure) == ("off", True)
    result = CliRunner().invoke(command, [], env={"COMPRESS_SERVER_CONFIG": str(config)})
    assert (result.exit_code, seen[1].workers) == (0, 5)


def test_defaults_of_the_command_are_those_of_the_settings(seen: list[Settings]) -> None:
    """Nothing is set twice."""
    assert CliRunner().invoke(command, []).exit_code == 0
    assert seen == [Settings()]


def test_help_documents_everything() -> None:
    """Each option with its environment variable and a text."""
    output = CliRunner().invoke(command, ["--help"], terminal_width=200).output
    for setting in fields(Settings):
        assert f"--{setting.name.replace('_', '-')}" in output
        assert f"COMPRESS_SERVER_{setting.name.upper()}" in output
        assert setting.metadata["help"]


@pytest.mark.parametrize(
    ("text", "message"), [("wrokers = 1", "unknown keys: wrokers"), ("workers =", "cannot read"), (None, "cannot read")]
)
def test_a_wrong_configuration_file_is_told(
    tmp_path: Path, seen: list[Settings], text: str | None, message: str
) -> None:
    """Unknown keys, bad TOML and a missing file are usage errors."""
    config = tmp_path / "server.toml"
    if text is not None:
        config.write_text(text)
    result = CliRunner().invoke(command, ["--config", str(config)])
    assert (result.exit_code, seen) == (2, [])
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(("text", "expected"), [("1024", 1024), ("2MiB", 2 * MIB), ("3g", 3 * GIB), ("5 k", 5120)])
def test_sizes(seen: list[Settings], text: str, expected: int) -> None:
    """Sizes may carry a unit."""
    assert CliRunner().invoke(command, ["--max-blob-bytes", text]).exit_code == 0
    assert seen[0].max_blob_bytes == expected
    assert CliRunner().invoke(command, ["--max-blob-bytes", "many"]).exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"listen": "0.0.0.0:1"}, "--insecure"),
        ({"listen": "example.org:1", "token": "t"}, "--insecure"),
        ({"listen": "nowhere"}, "HOST:PORT"),
        ({"listen": "127.0.0.1:99999"}, "HOST:PORT"),
        ({"workers": 0}, "workers"),
        ({"blob_ttl_s": 0.0}, "blob_ttl_s"),
        ({"max_chunk_bytes": 8 * MIB}, "max_chunk_bytes"),
        ({"sandbox": "maybe"}, "sandbox"),
        ({"tls_client_ca": Path("x")}, "tls_client_ca"),
    ],
)
def test_settings_are_checked(changes: dict[str, object], message: str) -> None:
    """A server never starts with a setting that makes no sense, nor open to others without TLS and authentication."""
    with pytest.raises(SettingsError, match=message):
        Settings(**changes)  # type: ignore[arg-type]  # the wrong values are the point


def test_others_are_served_with_tls_and_authentication() -> None:
    """Or where --insecure says so; IPv6 loopback is loopback."""
    Settings(listen="0.0.0.0:1", insecure=True)
    Settings(listen="0.0.0.0:1", tls_cert=Path("c"), tls_key=Path("k"), token="t")
    assert Settings(listen="[::1]:50051").host == "::1"
