"""Commands on the server: `recipes`, `info`, `health`; and `completion`."""

from __future__ import annotations

import click

from modelpress_client.cli.options import SharedHelp, shared_of
from modelpress_client.cli.output import Output
from modelpress_client.cli.session import Session, run
from modelpress_client.errors import ServerUnreachableError

COMPLETION_VARIABLE = "_COMPRESS_CLIENT_COMPLETE"


@click.command(cls=SharedHelp, short_help="List the presets, or print one as YAML.")
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the presets of the server, or print one as YAML: a file that --recipe takes."""

    async def body(session: Session) -> None:
        from modelpress_protos.recipe import from_dict, to_dict

        from modelpress_client.cli.tables import print_presets
        from modelpress_client.recipes import preset_document, to_yaml

        presets = (await session.client.server_info()).presets
        if name is not None:
            document = preset_document(name, presets)
            session.out.document(document)
            session.out.data(to_yaml(from_dict(document)).rstrip())
            return
        listed = [{"name": item.name, "summary": item.summary, "recipe": to_dict(item.recipe)} for item in presets]
        session.out.document({"presets": listed})
        session.out.show(lambda console: print_presets(console, presets))

    run(body)


@click.command(cls=SharedHelp, short_help="Show the server: version, limits, techniques.")
def info() -> None:
    """Show version, limits, formats, techniques with their options, presets and devices of the server."""

    async def body(session: Session) -> None:
        from modelpress_client.cli.tables import print_server
        from modelpress_client.jsonable import to_json

        server = await session.client.server_info()
        session.out.document(to_json(server))
        session.out.show(lambda console: print_server(console, server))

    run(body)


@click.command(cls=SharedHelp)
def health() -> None:
    """Exit with 0 only when the server is serving."""

    async def body(session: Session) -> int | None:
        address = session.client.settings.address
        status = await session.client.health()
        if status != "SERVING":
            raise ServerUnreachableError(f"The server at {address} answers, but is not serving ({status}).")
        session.out.document({"status": status, "server": address})
        session.out.data(status)
        return None

    run(body)


@click.command(cls=SharedHelp, short_help="Print a shell completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell; for bash: eval "$(compress-client completion bash)"."""
    from click.shell_completion import get_completion_class

    group = context.find_root().command
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"There is no completion for {shell}.")
    program = group.name or ""
    script = kind(group, {}, program, COMPLETION_VARIABLE)
    # source() would start bash to ask for its version.
    text = script.source_template % script.source_vars()
    shared = shared_of(context)
    out = Output(as_json=shared.json, quiet=shared.quiet)
    out.document({"shell": shell, "script": text})
    out.data(text.strip())


COMMANDS = (recipes, info, health, completion)
