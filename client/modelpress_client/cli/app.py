"""The command group, and the one place where exceptions become exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from modelpress_client.cli import compressing, listing, results, serving, verifying
from modelpress_client.cli.options import SharedHelpGroup
from modelpress_client.cli.output import Output
from modelpress_client.cli.session import InterruptedCommandError, interrupted
from modelpress_client.errors import ModelpressError

PROGRAM = "compress-client"
EXIT_BROKEN_PIPE = 141  # as a shell shows death by SIGPIPE

EPILOG = """\b
Examples:
  compress-client upload model.pt --input 'x:float32[batch,3,224,224]' --data samples.npz
  compress-client upload model.onnx --recipe default --eval test.npz --max-drop 0.01
  compress-client --local upload model.onnx
\b
Exit codes: 0 done; 1 the job failed; 2 wrong usage or unusable input; 3 not authenticated or not allowed;
4 server not reachable; 5 timed out; 6 a constraint is not met; 130 interrupted (the job goes on)."""


@click.group(
    PROGRAM,
    cls=SharedHelpGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="modelpress", prog_name=PROGRAM)
def cli() -> None:
    """Compresses models on a modelpress server: upload a model, get back a smaller, faster ONNX model and a report that
    proves it."""


for _command in (*compressing.COMMANDS, *results.COMMANDS, *listing.COMMANDS, *serving.COMMANDS, *verifying.COMMANDS):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `compress-client`. Leaves by SystemExit."""
    # gRPC's core writes every failed handshake to stderr; what matters is in our own message.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(given))


def _run(arguments: list[str]) -> int:
    out = Output(as_json="--json" in arguments, quiet=False)
    try:
        result: Any = cli.main(arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except ModelpressError as error:
        code = _failed(out, error)
    except click.ClickException as error:
        code = _misused(out, error)
    except (KeyboardInterrupt, click.Abort, InterruptedCommandError) as error:
        code = interrupted(out, str(error) or "Nothing was started on the server.", getattr(error, "job", ""))
    except BrokenPipeError:
        # The reader has gone (`| head`); the interpreter must not try to flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_BROKEN_PIPE
    except Exception as error:
        # A bug of ours must not end in a traceback for the user.
        if os.environ.get("COMPRESS_DEBUG"):
            raise
        text = f"{type(error).__name__}: {error}. This is a bug of the client; COMPRESS_DEBUG=1 shows where."
        code = _failed(out, ModelpressError(text, reason="INTERNAL"))
    return code


def _failed(out: Output, error: ModelpressError) -> int:
    out.document({"error": {"reason": error.reason, "message": error.message, "details": error.details}})
    out.error(error.message)
    return error.exit_code


def _misused(out: Output, error: click.ClickException) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    message = error.format_message()
    out.document({"error": {"reason": "USAGE", "message": message, "details": {}}})
    context = getattr(error, "ctx", None)
    hint = f" See '{context.command_path} --help'." if context is not None else ""
    out.error(f"{message}{hint}")
    return 2
