# Every target sets up what it needs: an environment of its own in .venv, made again when the project's files change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SECONDS ?= 300

.DEFAULT_GOAL := help
.PHONY: help demo test test-all coverage test-lowest docs check format bench stress judge fuzz clean

help:  ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m compileall -q cogtools  # so that the first start is as fast as all others
	@touch $(READY)

demo: $(READY)  ## Make a sample checkpoint, then export, verify and inspect it.
	@$(BIN)/python -m tools.demo $(BIN)/cogtools .demo

test: $(READY)  ## Run the tests but for the slow ones.
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-all: $(READY)  ## Run the slow tests: those that need a server or a cluster, or seconds for a case.
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow || test $$? -eq 5  # pytest's code for "no tests"

coverage: $(READY)  ## Run the tests but for the slow ones, and see how much of the code they run: not under the floor.
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" --cov --cov-fail-under=94 --cov-report=term:skip-covered

LOWEST := .venv-lowest/.ready
$(LOWEST): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[dev]'
	@touch $(LOWEST)

test-lowest: $(LOWEST)  ## Run the tests with the lowest releases of all that cogtools needs.
	.venv-lowest/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow" -W default

check: $(READY)  ## Check format, lint, types, the pages' examples and the workflows.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tools.page_examples .examples
	$(BIN)/mypy .examples
	$(BIN)/python -m tools.cli_pages --check
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

docs: $(READY)  ## Make the page of the command line, the picture of the README, and the site, in .site.
	$(BIN)/python -m tools.cli_pages
	$(BIN)/python -m tools.picture docs/images/strength.png
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY)  ## Put the code into the project's format.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## Measure speed and memory against torch and diffusers, as ratios.
	$(BIN)/python -m benchmarks.bench .bench
	$(BIN)/python -m benchmarks.remote .bench/remote

stress: $(READY)  ## Kill hundreds of exports at random moments, and send others storms of signals.
	$(BIN)/python -m tests.support.interruption --kills 300 --storms 300

judge: $(READY)  ## Judge what LoRA files can state by forward passes of diffusers and PEFT.
	$(BIN)/python -W ignore -m tests.support.judge

fuzz: $(READY)  ## Fuzz all that reads files, for SECONDS=300 in all.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.support.fuzz_readers .fuzz --seconds $(SECONDS)

clean:  ## Remove everything that make and the tools made.
	rm -rf .venv .venv-lowest .demo .bench .fuzz .site .examples build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
