# Every command that the README names. On a machine with Python >= 3.11, git and make nothing else is needed.
PYTHON ?= python3
BIN := .venv/bin
# An index with CPU builds of torch saves gigabytes on Linux: make test TORCH_INDEX=<its address>
TORCH_INDEX ?=

# Start the service with the shipped artefact, on http://127.0.0.1:8000.
.PHONY: serve
serve: .venv/serve.stamp
	$(BIN)/tissue serve

# Run the whole test suite.
.PHONY: test
test: .venv/test.stamp
	$(BIN)/pytest

# Format, lint, types, import contracts.
.PHONY: check
check: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

# Train a small network on generated tiles and export it: three minutes that show the whole way.
.PHONY: train
train: .venv/test.stamp
	$(BIN)/tissue-train fit configs/smoke.toml

# Compare the service with what else one could pick; needs wrk.
# Stopped halfway, the same command goes on. Less: make bench BENCH='--seconds 2 --rounds 1 --skip ray'
BENCH ?=
.PHONY: bench
bench: .venv/test.stamp
	$(BIN)/python -m benchmarks run $(BENCH)
	$(BIN)/python -m benchmarks report

# Build the container image with the engine that is here, and ask it for everything once: make image TARGET=gpu
TARGET ?= cpu
.PHONY: image
image:
	deploy/image.sh $(TARGET)

# Renew what the images install: the newest versions that pyproject.toml allows, with their hashes.
LOCK := $(BIN)/uv pip compile pyproject.toml --quiet --upgrade --generate-hashes --custom-compile-command 'make lock'
.PHONY: lock
lock: .venv/bin/uv
	echo onnxruntime | $(LOCK) - --universal --python-version 3.11 --no-emit-package onnxruntime-gpu --output-file requirements.lock
	$(LOCK) --extra cuda --python-platform linux --python-version 3.13 --output-file requirements-gpu.lock

# Half an environment would be taken for a whole one the next time.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("tissue needs Python 3.11 or newer: make PYTHON=python3.13")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/bin/uv: | .venv/bin/python
	$(BIN)/python -m pip install --quiet uv

.venv/serve.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/test.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[train,test]' $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	touch $@ .venv/serve.stamp
