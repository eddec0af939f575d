"""Options that several commands share, before the command or after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from modelpress_client.cli import again
from modelpress_client.quantities import parse_duration_s, parse_share, parse_size_bytes
from modelpress_client.settings import DEFAULT_PROJECT, DEFAULT_SERVER

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_KEY = "modelpress.shared"
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class Number(click.FloatRange):
    """Called a number, in the help and in errors."""

    name = "number"


class WholeNumber(click.IntRange):
    """Likewise."""

    name = "whole number"


POSITIVE = Number(min=0, min_open=True)


class Quantity(click.ParamType):  # type: ignore[type-arg]  # generic in the stubs of some versions only
    """A number with its unit. `parse` raises ValueError with what is wrong; `name` stands in the help."""

    def __init__(self, parse: Callable[[str], float], name: str) -> None:
        self._parse = parse
        self.name = name

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"{error}.", parameter, context)


class OutputPath(click.Path):
    """A file or a folder. A name that ends in a slash is a folder, which is made: a path would forget the slash."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if isinstance(value, str) and value.endswith("/"):
            try:
                Path(value).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self.fail(f"the folder {value} cannot be made: {error.strerror}.", parameter, context)
        return super().convert(value, parameter, context)


@dataclass(frozen=True)
class Shared:
    """What the shared options say."""

    server: str = DEFAULT_SERVER
    local: bool = False
    data_dir: Path | None = None
    token: str | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    project: str = DEFAULT_PROJECT
    timeout_s: float | None = None
    json: bool = False
    quiet: bool = False


def shared_of(context: click.Context) -> Shared:
    """The values of this call: after the command wins over before it, and both over the environment."""
    given = context.meta.get(_KEY, {})
    return Shared(**{field.name: given[field.name][1] for field in fields(Shared) if field.name in given})


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    source = context.get_parameter_source(parameter.name or "")
    if source not in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT):
        return
    given = context.meta.setdefault(_KEY, {})
    before = given.get(parameter.name)
    if before is None or source == ParameterSource.COMMANDLINE or before[0] != ParameterSource.COMMANDLINE:
        given[parameter.name] = (source, value)


def _shared_options() -> list[click.Option]:
    common: dict[str, Any] = {"expose_value": False, "callback": _remember}
    return [
        click.Option(
            ["--server"],
            envvar="COMPRESS_SERVER",
            metavar="HOST:PORT",
            help=f"The server.  [default: {DEFAULT_SERVER}; env COMPRESS_SERVER]",
            **common,
        ),
        click.Option(
            ["--local"],
            is_flag=True,
            help="Start a server on this machine for this command (needs modelpress[server]).",
            **common,
        ),
        click.Option(
            ["--data-dir"],
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            help="Where --local keeps its data.  [default: the user's data directory]",
            **common,
        ),
        click.Option(
            ["--token"], envvar="COMPRESS_TOKEN", metavar="TEXT", help="Bearer token.  [env COMPRESS_TOKEN]", **common
        ),
        click.Option(
            ["--ca"],
            envvar="COMPRESS_CA",
            type=FILE,
            metavar="FILE",
            help="PEM file of the authority to trust; uses TLS.  [env COMPRESS_CA]",
            **common,
        ),
        click.Option(
            ["--cert"],
            envvar="COMPRESS_CERT",
            type=FILE,
            metavar="FILE",
            help="PEM file of the client's certificate.  [env COMPRESS_CERT]",
            **common,
        ),
        click.Option(
            ["--key"],
            envvar="COMPRESS_KEY",
            type=FILE,
            metavar="FILE",
            help="PEM file of the client's key.  [env COMPRESS_KEY]",
            **common,
        ),
        click.Option(["--project"], metavar="NAME", help=f"The project.  [default: {DEFAULT_PROJECT}]", **common),
        click.Option(
            ["--timeout", "timeout_s"],
            type=POSITIVE,
            metavar="SECONDS",
            help="Longest time for the whole command (exit code 5).",
            **common,
        ),
        click.Option(["--json"], is_flag=True, help="Exactly one JSON document on stdout.", **common),
        click.Option(["--quiet", "-q"], is_flag=True, help="No progress and no hints.", **common),
    ]


class SharedHelp(click.Command):
    """A command that takes the shared options and lists them apart from its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared = _shared_options()
        self.params += self._shared

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Notes them as they were given: commands that are advised repeat them."""
        if not context.resilient_parsing:
            again.remember(self, context, arguments)
        return super().parse_args(context, arguments)

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the command's own options, then the shared ones."""
        shared = set(map(id, self._shared))
        own = [item for item in self.get_params(context) if isinstance(item, click.Option) and id(item) not in shared]
        for title, parameters in (("Options", own), ("Options of every command", self._shared)):
            records = [record for item in parameters if (record := item.get_help_record(context)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class SharedHelpGroup(SharedHelp, click.Group):
    """The group: the shared options stand before the command as well."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands first: that is what a person looks for."""
        self.format_commands(context, formatter)
        SharedHelp.format_options(self, context, formatter)


def compression_options(function: FunctionT) -> FunctionT:
    """The options of `upload` and `compress`."""
    options = [
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="'NAME:DTYPE[DIM,...]'",
            help="An input, for formats that do not record them, if arrays of --data do not tell; a word as DIM is a "
            "dynamic dimension. Repeatable.",
        ),
        click.option(
            "--recipe",
            default="default",
            show_default=True,
            metavar="PRESET|FILE.yaml",
            help="What to do; see 'recipes'.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="PATH=VALUE",
            help="Override one recipe value: quantize.scheme=static, steps[1].prune.sparsity=0.3. Repeatable.",
        ),
        click.option(
            "--data",
            type=FILE,
            metavar="FILE.npz",
            help="Representative inputs: one array per input, first axis = samples.",
        ),
        click.option("--eval", "eval_data", type=FILE, metavar="FILE.npz", help="Evaluation inputs plus 'labels'."),
        click.option(
            "--metric",
            metavar="NAME|FILE.py:FUNCTION",
            help="Metric of the task: top1, top5, mse, mae, cosine, f1, spearman, retrieval, iou, cer, wer, map, map50 "
            "(docs/metrics.md has the layout of --eval for each); or a function of yours (FILE.py:FUNCTION, "
            "PACKAGE.MODULE:FUNCTION), which runs on this machine with the path of an ONNX file and what --eval holds.",
        ),
        click.option(
            "--metric-timeout",
            type=Quantity(parse_duration_s, "DURATION"),
            help="Longest that a function of yours may take for one model.  [default: 10m]",
        ),
        click.option(
            "--goal",
            type=click.Choice(["balanced", "smallest", "fastest", "accurate"]),
            help="What to aim for, whatever keeps the answers.  [default: balanced, where the recipe has no steps]",
        ),
        click.option(
            "--max-drop",
            type=Quantity(parse_share, "FLOAT|PERCENT"),
            help="Largest allowed fall of the metric, as 1% or 0.01; without labels, of the agreement. Exit code 6 "
            "where this or one of the next four is not met.",
        ),
        click.option("--max-size", type=Quantity(parse_size_bytes, "SIZE"), help="Largest allowed file, as 5MB."),
        click.option("--min-ratio", type=POSITIVE, metavar="FLOAT", help="How many times smaller it must be."),
        click.option("--max-latency", type=Quantity(parse_duration_s, "TIME"), help="Largest allowed p50, as 10ms."),
        click.option("--min-speedup", type=POSITIVE, metavar="FLOAT", help="How many times faster it must be."),
        click.option(
            "--search-time",
            type=Quantity(parse_duration_s, "DURATION"),
            help="The search ends after this, as 10m.  [default: of a far search about 4m, more for large models]",
        ),
        click.option(
            "--target",
            type=click.Choice(["cpu", "openvino", "cuda", "tensorrt", "fpga"]),
            help="What the result will run on, of what the server can measure on; see 'info'.  [default: cpu]",
        ),
        click.option(
            "--allow-damage",
            is_flag=True,
            help="Exit with 0 even if the result no longer resembles the original.",
        ),
        click.option(
            "-o",
            "--output",
            type=OutputPath(),
            metavar="FILE",
            help="Where the result goes: a file or a folder.  [default: STEM.optimized.onnx in the current folder]",
        ),
        click.option(
            "--report-dir",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            help="Where STEM.report.json and STEM.report.html go.  [default: beside the output]",
        ),
        label_option("A label of the model and the job. Repeatable."),
        click.option(
            "--priority",
            type=WholeNumber(-100, 100),
            metavar="N",
            default=0,
            show_default=True,
            help="The highest of the project's queued jobs is next, the oldest among equals.",
        ),
        click.option("--skip-cache", is_flag=True, help="Run even if an identical job has succeeded before."),
        click.option("--no-compress", is_flag=True, help="Store only, and print the model's name."),
        click.option("--detach", is_flag=True, help="Print the job's name and do not wait."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def label_option(text: str) -> Callable[[FunctionT], FunctionT]:
    """`--label k=v`."""
    return click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help=text)
