# Every target sets up its own virtual environment; all that has to be there is Python and make.
# Only gpu runs in the environment it finds, of PYTHON, and downloads nothing.
# PYTHON=python3.13 make test   uses another interpreter;  ARGS="--seeds 2" make verify   passes options.

PYTHON ?= python3
ARGS ?=
GPU_OUT ?= gpu-output
MAKEFLAGS += --no-print-directory

.PHONY: help verify test gpu docs lint format clean

help:
	@echo "make verify  run the main experiment on handwritten digits: about a minute after installing"
	@echo "make test    run the tests"
	@echo "make gpu     test and time the CUDA kernels on a GPU; PYTHON has to have CuPy and pytest"
	@echo "make docs    build the pages of docs/ as a site"
	@echo "make lint    check format, style and types"
	@echo "make format  rewrite the code in the project's format"
	@echo "make clean   remove virtual environments, caches and outputs"

# An environment is current while its stamp is newer than pyproject.toml.
.venv/stamp: EXTRA =
.venv-test/stamp: EXTRA = [test]
.venv-docs/stamp: EXTRA = [docs]
.venv-lint/stamp: EXTRA = [lint]
.venv/stamp .venv-test/stamp .venv-docs/stamp .venv-lint/stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("nalayer needs Python 3.11 or later; $(PYTHON) is %d.%d. Name another one: make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --editable '.$(EXTRA)'
	@touch $@

verify: .venv/stamp
	.venv/bin/python -m benchmarks equivalence --out verify-output $(ARGS)

test: .venv-test/stamp
	.venv-test/bin/python -m pytest $(ARGS)

# The timings are taken even where a test fails; the status then tells.
gpu:
	@mkdir -p $(GPU_OUT)
	@failed=0; \
	NALAYER_REQUIRE=cupy $(PYTHON) -m pytest tests/kernels/test_cupy.py \
	    --junitxml=$(GPU_OUT)/gpu-tests.xml > $(GPU_OUT)/gpu-tests.log 2>&1 || failed=1; \
	tail -n 20 $(GPU_OUT)/gpu-tests.log; \
	$(PYTHON) -m benchmarks gpu --json $(GPU_OUT)/gpu.jsonl $(ARGS) || failed=1; \
	exit $$failed

# Warnings, of a link that leads nowhere for one, are errors.
docs: .venv-docs/stamp
	.venv-docs/bin/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet \
	    -c docs $(ARGS) . docs-output
	@echo "docs-output/index.html"

lint: .venv-lint/stamp
	.venv-lint/bin/python -m ruff format --check .
	.venv-lint/bin/python -m ruff check .
	.venv-lint/bin/python -m mypy

format: .venv-lint/stamp
	.venv-lint/bin/python -m ruff format .
	.venv-lint/bin/python -m ruff check --fix .

clean:
	rm -rf .venv .venv-test .venv-docs .venv-lint
	rm -rf verify-output gpu-output docs-output build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
