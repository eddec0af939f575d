"""`python -m modelpress_server`."""

from modelpress_server.cli import main

main()
