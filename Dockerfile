# Training on NVIDIA GPUs with the pinned packages, as a user without rights:
#   docker build -t halos .
#   docker run --gpus all --ipc=host -v "$PWD/out:/work/out" halos train loss=kto output_dir=out/kto
# The user 10001 has to be allowed to write into the mounted folder. A token for the Hub is passed when a container runs
# (-e HF_TOKEN), never to the build.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Triton compiles a launcher for each kernel when it is first used, with gcc.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 halos \
    && mkdir -p /work/out \
    && chown halos /work/out

# uv brings the version of Python that the tests run on. PyTorch's packages bring the libraries of CUDA 13.0.
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_NO_CACHE=1 UV_LINK_MODE=copy VIRTUAL_ENV=/opt/venv
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir uv==0.13.9 \
    && /opt/uv/bin/uv venv --python 3.11 /opt/venv
ENV PATH=/opt/venv/bin:/opt/uv/bin:$PATH

# Packages before the code, so that a change to the code does not download them again.
WORKDIR /opt/halos
ARG EXTRAS=lora,qlora,liger
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir halos conf \
    && touch halos/__init__.py \
    && uv pip install --constraint constraints.txt ".[$EXTRAS]" \
    && uv pip uninstall halos
COPY conf conf
COPY scripts scripts
COPY halos halos
RUN uv pip install --no-deps --editable . \
    && python -m compileall -q halos

USER 10001
WORKDIR /work
ENV HALOS_CACHE=/work/out/cache
ENTRYPOINT ["halos"]
CMD ["--help"]
