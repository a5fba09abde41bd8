# The two commands of the README, and what they stand on. Every target installs first where that has not been done.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.simipu3d-installed
# Two processes of one thread each: most tests are too small to share between threads.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile

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
	$(PYTEST) -m "not slow" --durations=10

test-full: lint
	$(PYTEST) --durations=20

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
