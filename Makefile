# Two commands for a fresh machine: `make demo` and `make test`. Each makes .venv if it is not there.
# Tests run in WORKERS processes of one thread each.
PYTHON ?= python3.11
BIN := .venv/bin
WORKERS ?= 2
export TOKENIZERS_PARALLELISM := false

.PHONY: help .venv demo test test-all check format bench docs clean
help:  ## list the commands
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv: .venv/.complete  ## the environment, pinned by constraints.txt

# torch first and by pip: uv would otherwise choose among torch builds by itself.
.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv  ## Shears on a small real LLM: sparsify, train, search, report
	$(BIN)/elastune demo

test: .venv  ## unit and end-to-end tests (a quarter of an hour on two cores)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-all: .venv  ## everything, the slow tests too
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: .venv  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv  ## apply formatting and safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv  ## the benchmarks at a small size, one table (under 15 minutes on two cores)
	$(BIN)/python benchmarks/run_all.py

docs: .venv  ## the documentation site, in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

clean:  ## remove the environment and caches, not runs
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build *.egg-info
