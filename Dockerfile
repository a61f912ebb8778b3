# docker build --target cpu --tag tissue:cpu .      any machine
# docker build --target gpu --tag tissue:gpu .      NVIDIA driver >= 580; refuses to serve without a GPU
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS base
# The bytecode is compiled while installing: the root file system may be read-only later.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

FROM base AS environment
RUN python -m venv --without-pip /opt/tissue

# What changes seldom: as locked, verified by hash. Plain onnxruntime is the GPU wheel's module in a tenth of the size.
FROM environment AS cpu-dependencies
COPY requirements.lock /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/tissue/bin/python install --require-hashes --no-deps --requirement /build/requirements.lock

FROM environment AS gpu-dependencies
COPY requirements-gpu.lock /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/tissue/bin/python install --require-hashes --no-deps --requirement /build/requirements-gpu.lock

# What changes often: the same environment with nothing but this package, to be laid over the dependencies.
FROM environment AS package
COPY pyproject.toml README.md LICENSE /build/
COPY app /build/app
COPY model /build/model
COPY training /build/training
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/tissue/bin/python install --no-deps /build

FROM base AS service
COPY deploy/healthcheck.py /opt/healthcheck.py
# onnxruntime 1.29 and later tell their maker about the model and the machine unless told not to, before they start.
ENV PATH=/opt/tissue/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    TISSUE_HOST=0.0.0.0
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tissue" \
      org.opencontainers.image.description="Tells which tissue a small H&E image shows, how sure it is, and where it looked. For research use only, not a medical device." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0 AND LicenseRef-tissue-weights"
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s CMD ["python", "-IS", "/opt/healthcheck.py"]
ENTRYPOINT ["tissue"]
CMD ["serve"]

FROM service AS gpu
ENV TISSUE_DEVICE=cuda \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-dependencies /opt/tissue /opt/tissue
COPY --from=package /opt/tissue /opt/tissue

FROM service AS cpu
COPY --from=cpu-dependencies /opt/tissue /opt/tissue
COPY --from=package /opt/tissue /opt/tissue
