# One image for every Spillway process on Linux; compose or a command line chooses which. Models run on the CPU here.
FROM python:3.12-slim-bookworm AS build
WORKDIR /opt/spillway
RUN pip install --no-cache-dir uv==0.13.8
# Compiled once here: the user that runs it may not write there, and each start would compile everything anew.
ENV UV_LINK_MODE=copy UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1
COPY requirements.lock ./
RUN uv venv .venv && uv pip install --require-hashes -r requirements.lock
COPY . .
RUN uv pip install --no-deps --no-build-isolation -e .

FROM python:3.12-slim-bookworm
# OpenBLAS is faster than the BLAS in MLX's wheel; g++ is what MLX compiles fused kernels with on a CPU.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libopenblas0-pthread \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --home-dir /var/lib/spillway spillway
COPY --from=build /opt/spillway /opt/spillway
ENV PATH=/opt/spillway/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/lib/spillway/huggingface \
    SPILLWAY_HOME=/var/lib/spillway \
    SPILLWAY_LOG_FORMAT=json
USER spillway
VOLUME /var/lib/spillway
EXPOSE 8000
STOPSIGNAL SIGTERM
CMD ["spillway", "up"]
