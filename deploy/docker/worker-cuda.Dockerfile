# A worker on NVIDIA GPUs. torch's wheels bring CUDA; the driver comes from the host, by NVIDIA's container runtime.
#   docker build -f deploy/docker/worker-cuda.Dockerfile -t chaccu-worker-cuda:0.1.0 .
FROM python:3.12-slim-bookworm AS build
COPY . /source
RUN python -m venv /opt/chaccu && \
    /opt/chaccu/bin/pip install --no-cache-dir --constraint /source/constraints.txt '/source[train,otel]'

FROM python:3.12-slim-bookworm
# Triton compiles a small launcher for its kernels when they are first used.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin chaccu
COPY --from=build /opt/chaccu /opt/chaccu
ENV PATH=/opt/chaccu/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
ENTRYPOINT ["chaccu"]
CMD ["worker", "--model", "/models/model", "--gateway", "http://gateway:8000"]
