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

# Train a small network on generated tiles and export it: three minutes that show the whole way.
.PHONY: train
train: .venv/test.stamp
	$(BIN)/tissue-train fit configs/smoke.toml

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/serve.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/test.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[train,test]' $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	touch $@ .venv/serve.stamp
