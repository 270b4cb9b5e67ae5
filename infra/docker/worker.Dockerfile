# syntax=docker/dockerfile:1
# The worker's container image: one worker, torch with its own CUDA libraries. Weights are in a volume.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG LOCK=worker-cuda.txt
WORKDIR /src
COPY infra/docker/${LOCK} ./lock.txt
RUN python -m venv /opt/cutfleet \
 && /opt/cutfleet/bin/pip install --no-cache-dir --require-hashes -r lock.txt
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY jobs ./jobs
COPY workers ./workers
RUN /opt/cutfleet/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="cutfleet-worker" \
      org.opencontainers.image.description="Removes image backgrounds: one process for each GPU" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin cutfleet \
 && install -d -o 10001 -g 10001 /models
COPY --from=build /opt/cutfleet /opt/cutfleet
# These two variables make the container toolkit mount the driver; torch's wheels contain the rest of CUDA.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/cutfleet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/models \
    CUTFLEET_ALIVE_FILE=/tmp/alive
VOLUME ["/models"]
USER 10001:10001
WORKDIR /tmp
STOPSIGNAL SIGTERM
# The file appears when the model is loaded and warm. The worker's loop touches it; a stuck loop does not.
HEALTHCHECK --interval=20s --timeout=5s --start-period=300s --retries=3 \
  CMD ["/bin/sh", "-c", "test -n \"$(find \"$CUTFLEET_ALIVE_FILE\" -mmin -1)\""]
ENTRYPOINT ["python", "-m", "workers"]
