# syntax=docker/dockerfile:1
# The gateway and, with Ray's client beside it, the controller. Neither has torch or vLLM.
#   docker buildx build -f deploy/docker/gateway.Dockerfile --target gateway -t headrace/gateway:0.1.0 .
#   docker buildx build -f deploy/docker/gateway.Dockerfile --target controller -t headrace/controller:0.1.0 .
# For amd64 and arm64, with SBOM and signature: deploy/docker/README.md.
ARG PYTHON=3.12.12-slim-trixie
ARG VERSION=0.1.0

FROM python:${PYTHON} AS base
ENV PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements ./requirements
# The file pins every version with its hashes, and nothing that it does not name is installed.
RUN python -m venv /opt/headrace \
    && /opt/headrace/bin/pip install --no-deps --only-binary :all: --require-hashes -r requirements/base.txt
# The version is a tag of the repository, which is not copied.
ARG VERSION
COPY pyproject.toml README.md LICENSE ./
COPY cluster ./cluster
RUN /opt/headrace/bin/pip install --no-deps --only-binary :all: --require-hashes -r requirements/build.txt \
    && SETUPTOOLS_SCM_PRETEND_VERSION_FOR_HEADRACE="$VERSION" \
       /opt/headrace/bin/pip install --no-deps --no-build-isolation . \
    && /opt/headrace/bin/python -m compileall -q /opt/headrace/lib \
    && /opt/headrace/bin/headrace version

FROM base AS with-ray
# Jobs for a Ray cluster are handed in by Ray's own client; ray.txt says which version of what it needs.
RUN /opt/headrace/bin/pip install --no-deps --only-binary :all: --require-hashes -r requirements/ray.txt \
    && /opt/headrace/bin/python -m compileall -q /opt/headrace/lib

FROM python:${PYTHON} AS run
RUN groupadd --gid 10001 headrace \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin headrace \
    && install -d -o 10001 -g 10001 /var/lib/headrace
ENV PATH=/opt/headrace/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /var/lib/headrace
USER 10001:10001
ENTRYPOINT ["headrace"]
CMD ["--help"]

FROM run AS controller
COPY --from=with-ray /opt/headrace /opt/headrace
LABEL org.opencontainers.image.title="headrace-controller" org.opencontainers.image.licenses="Apache-2.0"

FROM run AS gateway
COPY --from=base /opt/headrace /opt/headrace
LABEL org.opencontainers.image.title="headrace-gateway" org.opencontainers.image.licenses="Apache-2.0"
EXPOSE 50051 50052 50053 50054 8000 9400
