# Every target works on a fresh machine with Python 3.11 and a C++ compiler. Stamp files in .venv
# record what was installed and built, so that nothing is done twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt
KERNELS := setup.py $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test pytest bench findings big gpu sanitize clean

demo: $(VENV)/.demo $(VENV)/.native
	$(BIN)/python examples/demo.py --out out

test: $(VENV)/.test $(VENV)/.native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --jobs=2 pytest sanitize

pytest: $(VENV)/.test $(VENV)/.native
	$(BIN)/pytest

bench: $(VENV)/.bench $(VENV)/.native
	$(BIN)/pytest benchmarks/ --benchmark-only --benchmark-columns=min,median,iqr,rounds \
		--benchmark-time-unit=ms

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

# Runs the compiled code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: $(VENV)/.test $(VENV)/.native
	$(BIN)/python tests/tools/sanitize.py
	$(BIN)/python tests/tools/sanitize_extension.py

$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools ninja
	touch $@

# Without a compiler this builds nothing; `wavprune info` says so.
$(VENV)/.native: $(VENV)/.tools $(KERNELS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# WAVPRUNE_NO_EXTENSION: the target above builds the extension, once for all extras.
$(VENV)/.demo $(VENV)/.bench $(VENV)/.test: $(VENV)/.%: $(VENV)/.tools $(SOURCES)
	WAVPRUNE_NO_EXTENSION=1 $(INSTALL) --no-build-isolation --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info src/*.egg-info src/wavprune/*.so
