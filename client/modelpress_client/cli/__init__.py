"""The command `compress-client`. Importing it loads click and nothing heavier: `--help` must be instant."""

from modelpress_client.cli.app import main

__all__ = ["main"]
