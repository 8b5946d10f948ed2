# The two commands of the README are `make demo` and `make test`; each makes its own virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= 2.13.0
TEST_WORKERS ?= 2
FUZZ_SECONDS ?= 60
FUZZ_SEED    ?= 0
GPU_MINUTES  ?= 20
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BUILT  := dist/.built-$(notdir $(VENV))

.PHONY: help install demo test lint bench bench-quick bench-check plots roofline wheel wheel-check docs fuzz sanitize sanitize-quick neon memcheck gpu gpu-dry clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP)  ## virtual environment with the package, editable, and all that the other targets need

$(STAMP): Makefile pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,evaluation,test,models,bench,docs,dev]"
	@touch $@

demo: install  ## train four inheritance networks on real data, unlearn a class in all their models, show the result
	$(BIN)/fiun-fast demo --out demo-out

test: install  ## all tests; no GPU needed, what did not run is named in the summary; TEST_WORKERS=0 for one process
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## benchmarks, about a quarter of an hour; prints the table, writes bench/results/
	$(BIN)/python -m pytest bench -q

bench-quick: install  ## smaller sizes, about seven minutes; what bench-check compares with
	$(BIN)/python -m pytest bench -q --mode quick

bench-check: install  ## have ratios dropped by more than 30 % since the committed quick results?
	$(BIN)/python bench/check.py

plots: install  ## pictures in docs/img/ and tables in README.md and docs/performance.md, from committed results
	$(BIN)/python bench/plots.py

roofline: install  ## how far the GPU kernels' machine code is from the memory's roof; no GPU needed, nvcc is; a few minutes
	$(BIN)/python tests/roofline.py

wheel: $(BUILT)  ## manylinux wheel for this Python, and a source distribution, in dist/; with GPU code where there is nvcc
	@ls -l "$$(cat $(BUILT))" | awk '{ printf "%s, %.2f MB\n", $$9, $$5 / 1e6 }'

$(BUILT): $(STAMP) README.md LICENSE MANIFEST.in $(wildcard fiun_fast/*.py fiun_fast/*/*.py)
	rm -rf build/dist
	FIUN_FAST_CUDA=$${FIUN_FAST_CUDA:-auto} $(BIN)/python -m build --outdir build/dist .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir build/dist/repaired build/dist/*.whl
	mkdir -p dist && cp build/dist/*.tar.gz build/dist/repaired/*.whl dist/
	echo dist/"$$(basename build/dist/repaired/*.whl)" > $@

wheel-check: wheel  ## that wheel, installed where there is nothing else, no compiler either; TORCH=2.x.y names the torch beside it
	$(BIN)/python tests/wheel_check.py "$$(cat $(BUILT))" --torch "$(TORCH)"

fuzz: install  ## random operations and values against plain torch, for FUZZ_SECONDS (60) from FUZZ_SEED (0)
	$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

sanitize: install  ## the C++ and CUDA sources under the sanitizers, on the CPU, alone and under the Python tests
	bash tests/cpp/sanitize.sh
	$(BIN)/python tests/sanitize_shim.py
	$(BIN)/python tests/sanitize_python.py

sanitize-quick: install  ## the cpu extension under the sanitizers with a part of the Python tests, two minutes
	$(BIN)/python tests/sanitize_python.py --quick

neon:  ## the C++ sources for arm64 against the scalar rules; Debian: g++-aarch64-linux-gnu, qemu-user
	sh tests/cpp/neon.sh

gpu: install  ## everything a machine with a GPU can say, in GPU_MINUTES (20); gpu-out/gpu.md and gpu.json
	$(BIN)/fiun-fast gpu --out gpu-out --minutes $(GPU_MINUTES)

gpu-dry: install  ## the same steps on the CPU, in about a minute; says nothing about a GPU
	$(BIN)/fiun-fast gpu --out gpu-out --dry

memcheck: install  ## the CUDA kernels under compute-sanitizer; needs an NVIDIA GPU
	sh tests/memcheck.sh $(BIN)/python

docs: install  ## the documentation as a site, in site/; a warning is an error
	$(BIN)/mkdocs build --strict --site-dir site

clean:  ## all that the other targets made, but not the virtual environment
	rm -rf build dist site demo-out gpu-out *.egg-info fiun_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fiun_fast tests bench -name __pycache__ -type d -exec rm -rf {} +
