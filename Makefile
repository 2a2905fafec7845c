# `make demo`: set up and quantize the shipped checkpoint. `make test`: set up and pass the tests.
# Both need only Python 3.11 or newer and a C toolchain; everything goes into .venv, from pip's index.
# `make test-clients`: build llama.cpp's tools in build/ (15 minutes, with cmake) and compare files with theirs.
# `make test-lm-eval`: install lm_eval in .venv, compare with its own models, and run a release with tasks, 5 minutes.
# `make test-vllm`: install vLLM for CPUs in build/ (3.5 GB) and compare artifacts there, 15 minutes.
# `make verify-engine`: install ENGINE (vllm or sglang, on a GPU machine) in build/ and verify ARTIFACT, which was made
# of SOURCE, in it; without them dsv2-mini in FP8 blocks, of `make demo`.
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

.PHONY: demo test test-clients test-vllm test-lm-eval verify-engine check-install lint clean

demo: $(STAMP)
	@$(BIN)/python -m dsv2quant release examples/dsv2-mini --recipe examples/release.yaml -o demo --jobs 2

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

ENGINE ?= vllm
ARTIFACT ?= demo/dsv2-mini-FP8-BLOCK
SOURCE ?= examples/dsv2-mini
verify-engine: $(STAMP)
	@test -e build/engines/$(ENGINE)/.ready || { $(PYTHON) -m venv --clear build/engines/$(ENGINE) \
		&& build/engines/$(ENGINE)/bin/python -m pip install --quiet $(ENGINE) && touch build/engines/$(ENGINE)/.ready; }
	@$(BIN)/dsv2quant verify $(ARTIFACT) --engine $(ENGINE) --engine-python build/engines/$(ENGINE)/bin/python \
		--source $(SOURCE) --generate --device cuda

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
