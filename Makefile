# Every target works on a fresh machine with Python 3.11 and a C++ compiler, and again on an
# existing .venv without reinstalling: a stamp file remembers what was installed and from what.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt

.PHONY: demo test bench lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --out out

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: $(VENV)/.bench
	$(BIN)/pytest benchmarks/ --benchmark-only

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.python $(SOURCES)
	$(INSTALL) --editable ".[demo]"
	touch $@

$(VENV)/.bench: $(VENV)/.python $(SOURCES)
	$(INSTALL) --editable ".[bench]"
	touch $@

$(VENV)/.test: $(VENV)/.python $(SOURCES)
	$(INSTALL) --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info src/*.egg-info src/wavprune/*.so
