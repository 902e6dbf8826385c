# One image for every node of a cluster: head, GPU workers and the driver. Built once, so that all nodes are alike.
#   docker build -t REGISTRY/safecl:0.1.0 . && docker push REGISTRY/safecl:0.1.0
# CUDA's libraries come with torch's wheels; of the host it needs NVIDIA's driver (580 or newer, for CUDA 13) and container toolkit.
FROM python:3.11-slim-bookworm

# Triton compiles launchers at run time (gcc); Ray's cluster launcher wants rsync, ssh and sudo in a container.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git rsync openssh-client sudo procps \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 --groups sudo ray && echo "ray ALL=(ALL) NOPASSWD:ALL" > /etc/sudoers.d/ray
ENV VIRTUAL_ENV=/opt/safecl PATH=/opt/safecl/bin:$PATH
RUN python -m venv $VIRTUAL_ENV && pip install --no-cache-dir --disable-pip-version-check uv==0.13.8

# The whole closure is pinned, so nothing is resolved here, and a rebuild gives the same versions.
COPY requirements-gpu.txt /tmp/
RUN uv pip install --no-cache --no-deps -r /tmp/requirements-gpu.txt

COPY pyproject.toml README.md LICENSE /src/
COPY safecl /src/safecl
RUN uv pip install --no-cache --no-deps /src && python -c "import safecl, torch, vllm, ray, deepspeed"
COPY --chown=ray sweeps /home/ray/sweeps

USER ray
WORKDIR /home/ray
ENV RAY_USAGE_STATS_ENABLED=0 SAFECL_CACHE=/home/ray/cache
