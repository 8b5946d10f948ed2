# The two commands of the README are `make demo` and `make test`; each makes its own virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= 2.13.0
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help install demo test lint bench wheel docs sanitize clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP)  ## virtual environment with the package, editable, and all that the other targets need

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,test,bench,dev]"
	@touch $@

demo: install  ## train four inheritance networks on real data, unlearn a class in all their models, show the result
	$(BIN)/fiun-fast demo --out demo-out

test: install  ## all tests; no GPU needed, what did not run is named in the summary
	$(BIN)/python -m pytest

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## benchmarks, written to bench/results/
	$(BIN)/python -m pytest bench --benchmark-only

wheel: install  ## a wheel for this Python in dist/
	$(BIN)/python -m build --wheel --outdir dist .

docs: $(STAMP)  ## the documentation as a site, in site/
	$(BIN)/python -m pip install --quiet ".[docs]"
	$(BIN)/mkdocs build --strict --site-dir site

clean:  ## all that the other targets made, but not the virtual environment
	rm -rf build dist site demo-out *.egg-info fiun_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fiun_fast tests bench -name __pycache__ -type d -exec rm -rf {} +
