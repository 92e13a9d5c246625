# Two commands do everything on a fresh machine: `make demo` and `make test`. Both install first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo

.PHONY: install demo test test-slow bench lint types clean

install: $(VENV)/installed

# -e: `noisyssl` is these folders; a second copy of a file would hide an edit
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "noisyssl needs Python 3.11 or newer: make install PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

demo: install
	$(BIN)/noisyssl demo $(OUT)

test: install lint types
	$(BIN)/python -m pytest -m 'not slow' -rs

test-slow: install
	$(BIN)/python -m pytest -m slow -rs

bench: install
	$(BIN)/noisyssl bench all

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow the editable mapping of folders to packages, so it reads an installed copy
types: install
	rm -rf build && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p noisyssl
	rm -rf build

clean:
	rm -rf build demo .pytest_cache .mypy_cache .ruff_cache
