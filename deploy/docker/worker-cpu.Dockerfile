# A worker without a GPU: llama.cpp, and transformers on torch's CPU build.
#   docker build -f deploy/docker/worker-cpu.Dockerfile -t chaccu-worker-cpu:0.1.0 .
FROM python:3.12-slim-bookworm AS build
COPY . /source
RUN python -m venv /opt/chaccu && \
    /opt/chaccu/bin/pip install --no-cache-dir --constraint /source/constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu '/source[train,cpu-engine,otel]' 'torch==2.13.0+cpu'

FROM python:3.12-slim-bookworm
# llama.cpp computes with OpenMP.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin chaccu
COPY --from=build /opt/chaccu /opt/chaccu
ENV PATH=/opt/chaccu/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001
ENTRYPOINT ["chaccu"]
CMD ["worker", "--model", "/models/model", "--gateway", "http://gateway:8000"]
