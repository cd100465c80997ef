# Every target works on a fresh machine with Python 3.11 and a C++ compiler, and again on an
# existing .venv without reinstalling: stamp files remember what was done, and from what.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt
KERNELS := setup.py $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test bench findings big gpu sanitize clean

demo: $(VENV)/.demo $(VENV)/.native
	$(BIN)/python examples/demo.py --out out

test: $(VENV)/.test $(VENV)/.native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest
	$(MAKE) sanitize

bench: $(VENV)/.bench $(VENV)/.native
	$(BIN)/pytest benchmarks/ --benchmark-only --benchmark-columns=min,median,iqr,rounds \
		--benchmark-time-unit=ms

# Measures again what docs/findings.md says; hours on two cores, and what is there is not repeated.
findings: $(VENV)/.test $(VENV)/.native
	$(BIN)/python examples/gradual.py
	$(BIN)/python examples/findings.py

# What needs a GPU: its tests, then what was measured beside what was computed in docs/gpu.md.
gpu: $(VENV)/.test $(VENV)/.native
	$(BIN)/pytest -m gpu tests
	$(BIN)/pytest -m gpu benchmarks/bench_gpu.py

# A checkpoint of more than 8 GiB, pruned and compressed in a sixth of that; not part of the tests.
big: $(VENV)/.test $(VENV)/.native
	WAVPRUNE_BIG=1 $(BIN)/pytest tests/checkpoint/test_memory.py

# The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.test
	$(BIN)/python tests/tools/sanitize.py

$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools ninja
	touch $@

# Without a compiler this builds nothing, and the package says so: `wavprune info`.
$(VENV)/.native: $(VENV)/.tools $(KERNELS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# The extension has a target of its own, so that no extra compiles it again.
$(VENV)/.demo $(VENV)/.bench $(VENV)/.test: $(VENV)/.%: $(VENV)/.tools $(SOURCES)
	WAVPRUNE_NO_EXTENSION=1 $(INSTALL) --no-build-isolation --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info src/*.egg-info src/wavprune/*.so
