# wavprune serve, for one machine:
#   docker build -t wavprune .
#   docker run --rm -p 127.0.0.1:8765:8765 -e WAVPRUNE_TOKEN=... -v wavprune:/data wavprune
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py constraints.txt README.md LICENSE MANIFEST.in ./
COPY csrc csrc
COPY src src
RUN WAVPRUNE_NO_CUDA=1 pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
# The CPU build of torch is a tenth of the default one, and has an index of its own.
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt \
        --index-url https://download.pytorch.org/whl/cpu torch
COPY --from=build /wheels /wheels
RUN wheel=$(ls /wheels/wavprune-*.whl) && \
    pip install --no-cache-dir --constraint /tmp/constraints.txt "$wheel[serve,onnx,huggingface]" && \
    rm -r /wheels
RUN useradd --create-home --uid 1000 wavprune && install -d -o wavprune /data
USER wavprune
VOLUME /data
EXPOSE 8765
# The page needs no token.
HEALTHCHECK CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8765/', timeout=5)"]
# Outside of the container the address is what `docker run -p` says; a token is needed all the same.
CMD ["wavprune", "serve", "--host", "0.0.0.0", "--directory", "/data"]
