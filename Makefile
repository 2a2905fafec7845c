# `make demo`: set up and quantize the shipped checkpoint. `make test`: set up and pass the tests.
# Both need only Python 3.11 or newer and a C toolchain; everything goes into .venv.
# `make test-clients`: build llama.cpp's tools in build/ (10 minutes, with cmake) and compare files with theirs.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: demo test test-clients lint clean

demo: $(STAMP)
	@$(BIN)/python examples/demo.py

test: lint
	@$(BIN)/python -m pytest

test-clients: $(STAMP)
	@$(BIN)/python tests/clients/llama_cpp/build.py
	@$(BIN)/python -m pytest tests/clients/llama_cpp

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info demo
