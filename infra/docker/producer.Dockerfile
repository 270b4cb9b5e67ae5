# syntax=docker/dockerfile:1
# The producer's container image: `cutfleet`, the dispatcher, and Flower. No torch, numpy or Pillow.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY infra/docker/producer.txt ./
RUN python -m venv /opt/cutfleet \
 && /opt/cutfleet/bin/pip install --no-cache-dir --require-hashes -r producer.txt
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY jobs ./jobs
COPY producer ./producer
RUN /opt/cutfleet/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="cutfleet-producer" \
      org.opencontainers.image.description="Submits, dispatches and monitors background-removal jobs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin cutfleet
COPY --from=build /opt/cutfleet /opt/cutfleet
ENV PATH=/opt/cutfleet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CUTFLEET_ALIVE_FILE=/tmp/alive
USER 10001:10001
WORKDIR /tmp
STOPSIGNAL SIGTERM
# For the dispatcher, whose loop touches the file. A container that runs one command ends before the first check.
HEALTHCHECK --interval=20s --timeout=5s --start-period=30s --retries=3 \
  CMD ["/bin/sh", "-c", "test -n \"$(find \"$CUTFLEET_ALIVE_FILE\" -mmin -1)\""]
ENTRYPOINT ["cutfleet"]
CMD ["dispatch"]
