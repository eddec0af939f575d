"""`verify`: whether a result answers alike in other versions of onnxruntime and on other CPUs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelpress_client.cli.options import FILE, SharedHelp, WholeNumber, shared_of
from modelpress_client.cli.output import Output
from modelpress_client.errors import EXIT_CONSTRAINT_NOT_MET, TimedOutError
from modelpress_client.verification import CPUS, Verification

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"equal": "green", "close": "green", "differs": "red", "refused": "red", "not had": "yellow"}
_SAME_DB = 200.0  # what the engine says of equal floats


@click.command(cls=SharedHelp, short_help="Run a result in other onnxruntimes and on other CPUs, and compare.")
@click.argument("path", metavar="FILE", type=FILE)
@click.option("--data", type=FILE, metavar="FILE.npz", help="Representative inputs.  [default: made-up ones]")
@click.option(
    "--onnxruntime",
    "versions",
    multiple=True,
    metavar="VERSION",
    help="A version to run in, or latest. Repeatable.  [default: 1.20.1, 1.23.2, latest]",
)
@click.option(
    "--cpu", "cpus", multiple=True, type=click.Choice(CPUS), help="A CPU to run on. Repeatable.  [default: all]"
)
@click.option("--qemu", is_flag=True, help="Emulate CPUs with QEMU even where this one can stand in for them.")
@click.option("--samples", type=WholeNumber(min=1), metavar="N", help="At most so many.  [default: 16]")
@click.pass_context
def verify(
    context: click.Context,
    path: Path,
    data: Path | None,
    versions: tuple[str, ...],
    cpus: tuple[str, ...],
    qemu: bool,
    samples: int | None,
) -> None:
    """Run an ONNX file on this machine, in other versions of onnxruntime and on other CPUs, and say where it answers
    alike: equal (bit for bit), close (up to rounding), or not.

    No server is asked. It needs modelpress[verify]; versions come from pip, other CPUs from this one, which hides
    instructions, and from QEMU (Debian: qemu-user). What cannot be had is told. Exit code 6 where the file answers
    otherwise in one place, or does not run there.
    """
    shared = shared_of(context)
    out = Output(as_json=shared.json, quiet=shared.quiet)
    document = asyncio.run(_verified(path, Verification(data, versions, cpus, qemu, samples), out, shared.timeout_s))
    out.document(document)
    out.show(lambda console: _print(console, document))
    raise SystemExit(EXIT_CONSTRAINT_NOT_MET if document["portable"] is False else 0)


async def _verified(path: Path, wanted: Verification, out: Output, timeout_s: float | None) -> dict[str, Any]:
    from modelpress_client.verification import verify as run

    try:
        async with asyncio.timeout(timeout_s):
            return await run(path, wanted, out.hint)
    except TimeoutError:
        raise TimedOutError(f"Not done within {timeout_s:g} s; environments that were made are kept.") from None


def _print(console: Console, document: dict[str, Any]) -> None:
    from rich.text import Text

    from modelpress_client.cli import units
    from modelpress_client.cli.tables import plain_table

    here = document["here"]
    source = "your data" if document["data"] == "provided" else "made-up inputs"
    console.print(
        f"\nCompared with onnxruntime {here['onnxruntime']} here ({here['cpu']}), on "
        f"{units.counted(document['samples'], 'sample')} of {source}:\n"
    )
    table = plain_table("Place", "How", "Verdict", "SQNR", "Largest error", "Same class", "", right=(3, 4, 5))
    for row in document["places"]:
        table.add_row(
            Text(row["place"]),
            Text(row["how"]),
            Text(row["verdict"], style=_STYLES.get(row["verdict"], "")),
            _decibels(row["sqnr_db"]),
            "" if row["max_abs_error"] is None else f"{row['max_abs_error']:.3g}",
            "" if row["top1_agreement"] is None else f"{row['top1_agreement']:.2%}",
            Text(row["detail"], style="dim"),
        )
    console.print(table)
    if document["portable"] is None:
        console.print("\nIt could be run nowhere else: nothing is known.", style="yellow")


def _decibels(value: float | None) -> str:
    if value is None:
        return ""
    return "same" if value >= _SAME_DB else f"{value:.1f} dB"


COMMANDS = (verify,)
