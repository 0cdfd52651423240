# An image of `graft`: `graft serve` by default, every other command by its name.
#
#   docker build --tag graft .                                       CPU
#   docker build --tag graft:cuda --build-arg TORCH=cu130 .          NVIDIA GPUs; any folder of download.pytorch.org/whl
#   docker build --build-arg EXTRAS=serve,gguf,remote .              other extras of pyproject.toml
#
#   docker run -p 8000:8000 -v ./adapters:/store:ro graft serve --model demo --store /store --host 0.0.0.0
#   docker run -v ./work:/work --no-healthcheck graft train run.yaml
#
# `make docker` builds it and tries it.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG TORCH=cpu
ARG EXTRAS=serve
# A compiler for the CPU kernels; it stays in this stage.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/graft
ENV PATH=/opt/graft/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# The dependencies first: they change seldom, and this layer is kept until they do. PyTorch's CUDA builds bring the triton that
# they were made with, which may be another one than the tests' pin.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); \
extras = [r for name in '${EXTRAS}'.split(',') for r in p['project']['optional-dependencies'][name]]; \
print(*p['build-system']['requires'], *p['project']['dependencies'], *extras, sep='\n')" > requirements.txt \
    && grep -v '^triton==' constraints.txt > pins.txt \
    && pip install --constraint pins.txt --extra-index-url "https://download.pytorch.org/whl/${TORCH}" --requirement requirements.txt
COPY setup.py README.md LICENSE ./
COPY graftlm graftlm
# Without isolation the build uses the setuptools that is installed already. The kernels are optional to pip, and not to this image.
RUN pip install --no-deps --no-build-isolation . \
    && cd / && python -c "from graftlm.kernels.native import library; found = library.get(); assert found.calls, found.reason"

FROM python:${PYTHON}-slim
ARG TORCH=cpu
# Triton compiles a launcher for each GPU kernel at its first use.
RUN if [ "$TORCH" != cpu ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --uid 10001 --create-home graft && install --directory --owner graft --group graft /cache /work
COPY --from=build /opt/graft /opt/graft
ENV PATH=/opt/graft/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/cache/huggingface GRAFT_CACHE=/cache/graft TRITON_CACHE_DIR=/cache/triton
# By number, so that Kubernetes can see that it is not root.
USER 10001
WORKDIR /work
EXPOSE 8000
HEALTHCHECK --start-period=10m --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["graft"]
CMD ["serve", "--model", "demo", "--host", "0.0.0.0"]
