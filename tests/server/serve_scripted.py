"""Serves the folder of the first argument with the scripted executor until killed; used to test kill -9.

A second argument is the file of --webhooks.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from modelpress_server.app import Server
from modelpress_server.config import Settings
from scripted_executor import ScriptedExecutor
from server_harness import DEFAULTS


async def main() -> None:
    webhooks = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    settings = Settings(**{**DEFAULTS, "data_dir": Path(sys.argv[1]), "webhooks": webhooks})
    server = Server(settings, lambda _: ScriptedExecutor())
    await server.start()
    print(server.address, flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
