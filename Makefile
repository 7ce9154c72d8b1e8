# Each target does its own set-up: on a fresh machine one command is enough.
#   make quickstart               train a small network on MNIST with the probe
#   make test                     the tests (ARGS="-m slow" or any pytest arguments)
#   make check                    format, lint and types
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes that share the tests; 0 runs them in one.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN_READY := $(VENV)/.ready-to-run
DEV_READY := $(VENV)/.ready-to-develop

.PHONY: quickstart test check format develop clean

quickstart: $(RUN_READY)
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(DEV_READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(DEV_READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict feature_probe integrations

format: $(DEV_READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

develop: $(DEV_READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUN_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing feature_probe into $(VENV) (PyTorch is large: a few minutes the first time)"
	$(PIP_INSTALL) -e .
	touch $@

$(DEV_READY): pyproject.toml constraints.txt tests/torchvision_stub.py | $(BIN)/python
	@echo "Installing feature_probe and its development tools into $(VENV) (a few minutes the first time)"
	$(PIP_INSTALL) -e '.[dev]'
	$(BIN)/python tests/torchvision_stub.py
	touch $(RUN_READY) $@
