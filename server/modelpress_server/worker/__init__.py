"""What runs in a worker's own process: the only place where bytes of a user are parsed.

    framing     messages over a pipe, both ends
    __main__    the life of a worker: confine, import, say Ready, run one task, end
    tasks       what a task does with the engine
    context     what a task may use; events: what it says meanwhile; folders: which files it touches
    convert     protobuf messages to the engine's types and back
    failures    exceptions to google.rpc.Status
    redaction   paths of this machine out of texts that a user sees

Importing this package imports no torch: the server uses `framing` and `redaction` as well.
"""

DEFAULT_TASKS = "modelpress_server.worker.tasks"
