# `make demo` and `make test` need CPython 3.11, pip, make and a C++ compiler, nothing else:
# each makes the environment .venv from constraints.txt when it is missing or out of date.
PYTHON ?= python3.11
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check lint types layers wheel format

demo: $(INSTALLED)
	$(BIN)/python -m examples.train_gpt

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS)

check: lint types layers wheel

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

layers: $(INSTALLED)
	$(BIN)/lint-imports

wheel: $(INSTALLED)
	$(BIN)/python scripts/wheel_smoke.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# torch goes first and pinned: a range would fetch its newest build.  Without build isolation setuptools is pinned too.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $$(grep -E '^(torch|setuptools)==' constraints.txt) -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[test,dev,demo]' -c constraints.txt
	touch $@
