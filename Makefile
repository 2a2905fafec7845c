# `make demo`: set up and quantize the shipped checkpoint. `make test`: set up and pass the tests.
# Both need only Python 3.11 or newer and a C toolchain; everything goes into .venv, from pip's index.
# `make test-clients`: build llama.cpp's tools in build/ (10 minutes, with cmake) and compare files with theirs.
# `make test-lm-eval`: install lm_eval in .venv and compare with its own models, 2 minutes.
# `make test-vllm`: install vLLM for CPUs in build/ (3.5 GB) and compare artifacts there, 15 minutes.
# `make check-install`: what pip would download from PyPI alone, or why it can't.
#
# TORCH_INDEX=URL   another index, for torch: https://download.pytorch.org/whl/cpu has it without CUDA packages.
# SYSTEM_TORCH=1    keep the torch (2.11 or newer) and triton that PYTHON has, whatever constraints.txt says.
# .venv remembers them; another value makes it anew.

-include .venv/settings.mk
PYTHON ?= python3
TORCH_INDEX ?=
SYSTEM_TORCH ?=
BIN := .venv/bin
VARIANT := $(if $(TORCH_INDEX)$(SYSTEM_TORCH),-$(shell echo '$(TORCH_INDEX) $(SYSTEM_TORCH)' | cksum | cut -d ' ' -f 1))
STAMP := .venv/.ready$(VARIANT)

.PHONY: demo test test-clients test-vllm test-lm-eval check-install lint clean

demo: $(STAMP)
	@$(BIN)/python examples/demo.py

# Two processes of one thread each: a file of tests stays in one of them.
test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-clients: $(STAMP)
	@$(BIN)/python tests/clients/llama_cpp/build.py
	@$(BIN)/python -m pytest tests/clients/llama_cpp

test-vllm: $(STAMP)
	@$(BIN)/python tests/clients/vllm/install.py $(TORCH_INDEX)
	@$(BIN)/python -m pytest tests/clients/vllm

test-lm-eval: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -e '.[lm-eval]'
	@$(BIN)/python -m pytest tests/clients/lm_eval

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

check-install: $(STAMP)
	@$(BIN)/python tools/check_install.py $(TORCH_INDEX)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(if $(wildcard $@),,--clear) $(if $(SYSTEM_TORCH),--system-site-packages) .venv
	@cp constraints.txt .venv/constraints.txt
ifneq ($(SYSTEM_TORCH),)
	@grep -vE '^(torch|triton)==' constraints.txt > .venv/constraints.txt
	@$(PYTHON) -m pip list --format=freeze | grep -E '^(torch|triton)==' >> .venv/constraints.txt \
		|| { echo 'SYSTEM_TORCH: $(PYTHON) has no torch (name the Python that has with PYTHON=)' >&2; exit 1; }
endif
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) pip -e '.[test]'
	@printf '%s ?= %s\n' TORCH_INDEX '$(TORCH_INDEX)' SYSTEM_TORCH '$(SYSTEM_TORCH)' > .venv/settings.mk
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info demo
