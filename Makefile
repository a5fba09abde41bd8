# The two commands of the README, and what they stand on. Every target installs first where that has not been done.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.simipu3d-installed

.PHONY: setup demo test test-full lint clean

setup: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt .ci/install
	PYTHON=$(PYTHON) bash .ci/install $(VENV)
	touch $@

demo: setup
	$(PY) tools/demo.py

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) .ci/types

test: lint
	$(PY) -m pytest -q -m "not slow" --durations=10

test-full: lint
	$(PY) -m pytest -q --durations=20

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
