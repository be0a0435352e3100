# Every target sets up the virtual environment it needs; all that has to be there is Python and make.
# Only gpu runs in the environment it finds, of PYTHON, and downloads nothing.
# PYTHON=python3.13 make test   uses another interpreter;  ARGS="--seeds 2" make verify   passes options.

PYTHON ?= python3
ARGS ?=
# The tests' processes, one a core and at most four; with WORKERS= everything runs in one.
WORKERS ?= --numprocesses logical --maxprocesses 4 --dist worksteal
# What runs Numba's kernels as they are written, line by line, where NumPy looks at every index: all of
# their own tests, and networks and training on top of them. All else is the same either way.
UNCOMPILED_TESTS ?= $(filter-out $(wildcard tests/kernels/test_*cu[dp]*),$(wildcard tests/kernels/test_*.py)) \
    $(addprefix tests/nalayer/test_,layers_and_network.py losses.py training.py)
GPU_OUT ?= gpu-output
# Of the benchmarks' own tests those that need the GPU.
GPU_TESTS ?= $(filter-out tests/benchmarks/%,$(wildcard tests/*/test_cupy*.py tests/*/test_*gpu*.py)) \
    $(addprefix tests/benchmarks/test_gpu_benchmark.py::,test_our_kernels_take_arrays_on_the_gpu \
    test_our_step_and_epoch_take_arrays_on_the_gpu \
    test_cupy_is_timed_by_its_events_and_weighed_by_a_pool)
GPU_TEST_SECONDS ?= 140
GPU_WAIT_SECONDS ?= 60
GPU_SECONDS ?= 270
SANITIZER ?= compute-sanitizer
SANITIZE_TESTS ?= $(wildcard tests/kernels/test_cupy*.py) \
    -k "same_bits or leaves or out_of_range or odd_shapes or bias_relu or sums or adam or gather"
SANITIZE_SECONDS ?= 90
MAKEFLAGS += --no-print-directory

.PHONY: help verify test test-uncompiled gpu gpu-sanitize docs lint format clean

help:
	@echo "make verify  run the main experiment on handwritten digits: about a minute after installing"
	@echo "make test    run the tests; make test-uncompiled those of Numba's kernels as plain Python"
	@echo "make gpu     test and time everything on a GPU; PYTHON has to have CuPy and pytest"
	@echo "make gpu-sanitize  run tests on a GPU under compute-sanitizer"
	@echo "make docs    build the pages of docs/ as a site"
	@echo "make lint    check format, style and types"
	@echo "make format  rewrite the code in the project's format"
	@echo "make clean   remove virtual environments, caches and outputs"

# An environment is current while its stamp is newer than pyproject.toml.
.venv/stamp: EXTRA =
.venv-dev/stamp: EXTRA = [dev]
.venv-docs/stamp: EXTRA = [docs]
.venv/stamp .venv-dev/stamp .venv-docs/stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("nalayer needs Python 3.11 or later; $(PYTHON) is %d.%d. Name another one: make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --editable '.$(EXTRA)'
	@touch $@

verify: .venv/stamp
	.venv/bin/python -m benchmarks equivalence --out verify-output $(ARGS)

test: .venv-dev/stamp
	.venv-dev/bin/python -m pytest $(WORKERS) $(ARGS)

test-uncompiled: .venv-dev/stamp
	NUMBA_DISABLE_JIT=1 .venv-dev/bin/python -m pytest $(WORKERS) $(UNCOMPILED_TESTS) $(ARGS)

# GPU's tests of which pytest's -k is the first argument, into files named after the second.
define gpu_tests
OMP_NUM_THREADS=1 NALAYER_REQUIRE=cupy timeout -k 10 $(3) \
    $(PYTHON) -m pytest $(GPU_TESTS) -k "$(1)" $(4) -p no:benchmark -p no:cacheprovider \
    --durations=10 --junitxml=$(GPU_OUT)/$(2).xml > $(GPU_OUT)/$(2).log 2>&1 \
    || failed=1; \
tail -n 40 $(GPU_OUT)/$(2).log
endef

# The timings are taken even where a test fails; the status then tells. Together less than 9 minutes.
# Tests run side by side where pytest-xdist is installed. Each has then one thread for BLAS and
# OpenMP, for theirs would wait for one another; the timings leave that to each library. Tests that
# nothing waits for the device come after, one by one: they keep it busy for half a second, and
# beside others that may be over before they have looked.
gpu:
	@mkdir -p $(GPU_OUT)
	@failed=0; \
	workers=$$($(PYTHON) -c 'import os, xdist; print("-n", min(12, os.cpu_count()))' 2>/dev/null); \
	$(call gpu_tests,not wait,gpu-tests,$(GPU_TEST_SECONDS),$$workers); \
	$(call gpu_tests,wait,gpu-wait,$(GPU_WAIT_SECONDS),); \
	timeout -k 10 $$(($(GPU_SECONDS) + 40)) $(PYTHON) -u -m benchmarks gpu \
	    --json $(GPU_OUT)/gpu.jsonl --seconds $(GPU_SECONDS) $(ARGS) \
	    > $(GPU_OUT)/gpu.log 2>&1 || failed=1; \
	cat $(GPU_OUT)/gpu.log; \
	exit $$failed

# Without CuPy's memory pool, which would hide what is written beside an array.
gpu-sanitize:
	@mkdir -p $(GPU_OUT)
	@failed=0; \
	for tool in memcheck racecheck; do \
	    NALAYER_REQUIRE=cupy timeout -k 10 $(SANITIZE_SECONDS) $(SANITIZER) --tool $$tool \
	        --target-processes all --error-exitcode 9 --log-file $(GPU_OUT)/$$tool.log \
	        $(PYTHON) -c 'import cupy, pytest, sys; cupy.cuda.set_allocator(None); \
	        sys.exit(pytest.main(sys.argv[1:]))' -q -x -p no:cacheprovider $(SANITIZE_TESTS) \
	        > $(GPU_OUT)/$$tool-tests.log 2>&1 || { echo "$$tool: status $$?"; failed=1; }; \
	    tail -n 5 $(GPU_OUT)/$$tool-tests.log $(GPU_OUT)/$$tool.log; \
	done; \
	exit $$failed

# Warnings, of a link that leads nowhere for one, are errors.
docs: .venv-docs/stamp
	.venv-docs/bin/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet \
	    -c docs $(ARGS) . docs-output
	@echo "docs-output/index.html"

lint: .venv-dev/stamp
	.venv-dev/bin/python -m ruff format --check .
	.venv-dev/bin/python -m ruff check .
	.venv-dev/bin/python -m mypy

format: .venv-dev/stamp
	.venv-dev/bin/python -m ruff format .
	.venv-dev/bin/python -m ruff check --fix .

clean:
	rm -rf .venv .venv-dev .venv-docs
	rm -rf verify-output gpu-output docs-output build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
