"""The server seen from outside: metrics, probes, and the HTTP that serves them.

    meter      what the parts of the server tell; takes note of nothing by itself
    stages     how long tasks are in their stages

Only where `--http-listen` is set are imported:

    metrics    the meter and the collector of Prometheus
    look       what is read when somebody asks: the store, the disk, the workers
    readiness  whether the server can do its work, check by check
    http       Starlette and uvicorn, in the event loop of gRPC
"""
