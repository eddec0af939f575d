# The server as a container. The CPU build of torch makes a much smaller image than the default one:
#
#   docker build --build-arg TORCH_SPEC=FILE_OR_URL_OF_A_CPU_WHEEL -t modelpress .
#   docker build --build-arg PIP_EXTRA_ARGS="--index-url YOUR_INDEX" -t modelpress .
#
# deploy/compose.yaml runs it with a read-only root file system; docs/server.md has the settings.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# What pip installs as torch: a version, or the URL of a wheel.
ARG TORCH_SPEC="torch==2.13.0"
# Further arguments of every `pip install`, for example another index.
ARG PIP_EXTRA_ARGS=""
# Optional parts; with `ray` besides, it is an image for the nodes of a Ray cluster and their servers.
ARG EXTRAS="server,postgres,s3"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/modelpress
ENV PATH=/opt/modelpress/bin:${PATH}
COPY constraints.txt ./
# A layer of its own: torch is most of the image and changes least.
# hadolint ignore=SC2086
RUN pip install ${PIP_EXTRA_ARGS} --constraint constraints.txt "${TORCH_SPEC}"
COPY pyproject.toml README.md LICENSE ./
COPY protos/modelpress_protos protos/modelpress_protos
COPY client/modelpress_client client/modelpress_client
COPY compression/modelpress_compression compression/modelpress_compression
COPY server/modelpress_server server/modelpress_server
# hadolint ignore=SC2086
RUN pip install ${PIP_EXTRA_ARGS} --constraint constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="modelpress" \
      org.opencontainers.image.description="Model compression as a service: a serialized model in, a smaller and faster ONNX model and a report out." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# A fixed uid, so that the owner of a mounted volume can be set beforehand.
RUN groupadd --gid 10001 modelpress \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin modelpress \
 && install --directory --owner=10001 --group=10001 --mode=0700 /data
COPY --from=build /opt/modelpress /opt/modelpress
ENV PATH=/opt/modelpress/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TMPDIR=/tmp
USER 10001:10001
WORKDIR /data
VOLUME ["/data"]
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=30s --retries=3 \
    CMD ["compress-client", "--server", "localhost:50051", "health"]
# It refuses to start on 0.0.0.0 without either TLS and authentication (COMPRESS_SERVER_TLS_CERT, _TLS_KEY and
# _TOKEN_FILE or _TLS_CLIENT_CA) or COMPRESS_SERVER_INSECURE=true, which says that the network around it is trusted.
ENTRYPOINT ["compress-server", "--listen", "0.0.0.0:50051", "--data-dir", "/data"]
