# The gateway: no torch, no weights. Build it from the repository's root:
#   docker build -f deploy/docker/gateway.Dockerfile -t chaccu-gateway:0.1.0 .
FROM python:3.12-slim-bookworm AS build
COPY . /source
RUN python -m venv /opt/chaccu && \
    /opt/chaccu/bin/pip install --no-cache-dir --constraint /source/constraints.txt '/source[redis,otel]'

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin chaccu
COPY --from=build /opt/chaccu /opt/chaccu
ENV PATH=/opt/chaccu/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
ENTRYPOINT ["chaccu"]
# Without keys it refuses to listen on an open address: mount a file of keys and name it in CHACCU_KEYS.
CMD ["gateway", "--host", "0.0.0.0", "--port", "8000", "--log-format", "json"]
