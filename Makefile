# For people who work on greenjobs, or try it. Needs Python 3.10 or later; all else is installed into .venv.

PYTHON ?= python3
# A PYTHON that was asked for must be the one in .venv; the default only makes it.
ifneq ($(origin PYTHON),file)
    ASKED = "$(PYTHON)"
endif
# Options of the program that a target runs: make stress ARGS="--jobs 500", make test ARGS="-k config".
ARGS ?=
BIN = .venv/bin

.PHONY: stress test test-faults fault-figures test-verbose lint ci bench clean venv venv-lint

stress: venv
	@$(BIN)/python -m examples.stress_test $(ARGS)

# All of them several files at a time, or those that ARGS chooses.
test: venv
ifeq ($(ARGS),)
	@$(BIN)/python .ci/test
else
	@$(BIN)/python -m pytest -q $(ARGS)
endif

# The tests of faults, with those that take minutes.
test-faults: venv
	@$(BIN)/python -m pytest -q -m "long or not long" tests/faults $(ARGS)

# The figures of docs/reliability.md; ARGS=--write puts them there.
fault-figures: venv
	@PYTHONPATH=tests $(BIN)/python -m faults.figures $(ARGS)

test-verbose: venv
	@$(BIN)/python -m pytest -v -s $(ARGS)

lint: venv venv-lint
	$(BIN)/python -m ruff check --config .ci/ruff.toml .
	$(BIN)/python -m ruff format --config .ci/ruff.toml --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

ci: test lint

bench: venv
	@$(BIN)/python -m benchmarks $(ARGS)

# Also takes away the private PostgreSQL that the examples use.
clean:
	rm -rf .venv .tox .greenjobs examples/*/.greenjobs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv:
	@sh .ci/venv test $(ASKED)

venv-lint: venv
	@sh .ci/venv lint $(ASKED)
