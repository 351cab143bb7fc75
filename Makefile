# make demo    environment, build, and the main job: a picture and a question, answered on 64 of 576 tokens
# make test    environment, build, all tests that need no GPU
# make ci      make test, and format, lint, types, packaging and a short bench
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test ci build style types wheel bench-smoke cmake matrix pocket-table clean

demo: build
	$(BIN)/restore-ext demo

test: build
	$(BIN)/python -m pytest

ci: test style types wheel cmake bench-smoke

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

build: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .

style: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

types: build
	$(BIN)/mypy

# The wheel must work where only torch and numpy are: no transformers, no source tree.
wheel: $(VENV)/ready
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(BIN)/python tools/check_wheel.py build/wheel/*.whl

cmake: $(VENV)/ready
	$(BIN)/cmake -S . -B build/cmake -DPython_EXECUTABLE=$(abspath $(BIN)/python) > /dev/null
	$(BIN)/cmake --build build/cmake --parallel 2

# Every bench once: providers agree, and the clock runs. The times mean little.
bench-smoke: build
	for bench in bench/bench_*.py; do \
	  $(BIN)/python -m bench.$$(basename $$bench .py) --dtype float32 --seconds 0.01 || exit 1; \
	done

# The hook tests under each supported transformers. Not in CI.
matrix: build
	$(BIN)/python tools/version_matrix.py

# Accuracy of every method on held-out questions, and the table in the README. Not in CI.
pocket-table: build
	$(BIN)/python -m bench.eval_pocket
	$(BIN)/python -m bench.eval_pocket --table

clean:
	rm -rf build dist *.egg-info restore_ext/*.so
