# Every target does its own set-up, in $(VENV) and from $(PYTHON): nothing else has to be installed.
#
#   make test ARGS="-k adahesscale"        arguments for the program a target runs
#   make test PYTHON=python3.13 VENV=.venv-next

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint types format docs figures dist benchmark-cost benchmark-quality \
    benchmark-training clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-examples ## Train on handwritten digits: orthogonal_newton and AdaHesScale beside Adam
	$(BIN)/python examples/digits.py $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests and the examples in docstrings
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev ## Check types
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Mend style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-docs ## Build the site, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

figures: $(VENV)/.installed-benchmarks ## Draw the pictures of the README and of the site
	for script in docs/figures/[a-z]*.py; do $(BIN)/python $$script || exit 1; done
	$(BIN)/python examples/second_order.py --output docs/figures/second_order.png
	$(BIN)/python examples/second_order.py --problem mlp --output docs/figures/second_order_mlp.png
	$(BIN)/python examples/digits.py --output docs/figures/digits.png
	$(BIN)/python examples/pruning.py --output docs/figures/pruning.png
	$(BIN)/python examples/continual.py --output docs/figures/continual.png

dist: $(VENV)/.installed-dev ## Build wheel and sdist, check them, and run the README's example with the wheel alone
	rm -rf dist $(VENV)-dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/pip install --quiet --disable-pip-version-check dist/*.whl
	sed -n '/^```python/,/^```/ { /^```$$/ q; /^```/ !p }' README.md > dist/example.py
	cd dist && $(abspath $(VENV)-dist)/bin/python -W error example.py && rm example.py

benchmark-cost: $(VENV)/.installed-peers ## Measure time and memory against those of a gradient
	$(BIN)/python benchmarks/cost.py $(ARGS)

benchmark-quality: $(VENV)/.installed-benchmarks ## Measure the error against the exact diagonal
	$(BIN)/python benchmarks/quality.py $(ARGS)

benchmark-training: $(VENV)/.installed-benchmarks ## Train with each optimizer, over learning rates
	$(BIN)/python benchmarks/training.py $(ARGS)

clean: ## Remove environments, caches and builds
	rm -rf $(VENV) .venv-* .hypothesis .mypy_cache .pytest_cache .ruff_cache dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras, renewed when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "hesscale_jax needs Python 3.11 or newer, but '$(PYTHON)' is" \
	        "$$($(PYTHON) --version 2>/dev/null || echo missing). Name another one: make PYTHON=python3.12 ..." >&2; \
	    exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    rm -rf $(VENV); \
	    echo "'$(PYTHON)' cannot create a virtual environment; on Debian and Ubuntu install" \
	        "python3-venv. Or name another one: make PYTHON=python3.12 ..." >&2; \
	    exit 1; }
