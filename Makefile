.DEFAULT_GOAL := help
PYTHON ?= python

.PHONY: help install check test fullsize learning faults bench bench-gpu docs

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install:  ## install the package with everything needed to work on it
	$(PYTHON) -m pip install -e '.[dev]'

check:  ## format, lint and type checks; changes nothing
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

test:  ## every test but those that train small models
	$(PYTHON) -m pytest

fullsize:  ## only the comparisons of models of published sizes
	$(PYTHON) -m pytest -n 1 -m full_size

learning:  ## only the tests that train a small model and check that it learned
	$(PYTHON) -m pytest -m learning

faults:  ## the long form of every fault: kills, signals, mutations, hostile input (over an hour)
	@grep -lE '^def main' tests/faults/*.py | sort | while read -r file; do $(PYTHON) -m "tests.faults.$$(basename "$$file" .py)" || exit 1; done

bench:  ## the CPU benchmarks beside the peers, about 20 minutes (pip install -e '.[bench]')
	@$(PYTHON) -m benchmarks

bench-gpu:  ## the GPU benchmarks, at most 9 minutes (pip install -e '.[bench,bench-gpu]')
	@$(PYTHON) -m benchmarks.gpu

docs:  ## build the documentation into site/
	$(PYTHON) -m mkdocs build --strict
