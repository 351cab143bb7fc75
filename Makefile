# make demo    environment, build, and the main job: a picture and a question, answered on 64 of 576 tokens
# make test    environment, build, all tests that need no GPU
# make ci      make test and test-quant (8-bit weights), and format, lint, types, packaging, a short bench, and make check-cuda
# make test-lowered    the AVX-512 levels of the CPU kernels, on a processor with AVX2
# make test-eval    the plug-in under the real lmms-eval, on drawn scenes
# make check-cuda      compiles the CUDA kernels and runs them on the CPU (no GPU); -all: everything
# make test-vllm    the vLLM plug-in under vLLM on the CPU, in an environment of its own
# make check-abi       one binary under the oldest torch and the newest, with and without CUDA
# make tables    the tables of the README and the docs, from bench/results
# make docs      the documentation site, in build/site
# make wheel wheel-cuda    wheels in dist/
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
OPS := $(filter-out require,$(basename $(notdir $(wildcard csrc/contracts/*.h))))
OP_TESTS := $(sort $(foreach op,$(OPS),$(wildcard python_tests/test_$(op)*.py)))
JOBS ?= 2

# Of the hook's, those that see every stage of it; make check-cuda-all runs all on the CUDA kernels.
HOOK_TESTS = $(if $(QUICK),python_tests/test_hf_decoding.py python_tests/test_hf_cache.py,\
  $(wildcard python_tests/test_hf_*.py))
# Of an operator's tests, what also runs with threads watched and from PTX, up to ten times slower: an
# expression of pytest's -k. make check-cuda-all runs all, on every instantiation.
QUICK ?= --quick
FEW := not same_bits and not many and not small_random and not more_groups \
  and not 576 and not 704 and not 1024 and (not means_what or (bfloat16 and not plain))
FEW_check := $(FEW) and not without_a_bias
FEW_ptx80 := $(FEW) and not 96 and not 128 and (not float16 or bfloat16)
FEW_ptx90a := $(FEW_ptx80)
# What the checker remembers of a matrix of 11600 x 11600 does not fit into 24 GiB.
ALL_check := not very_many

.PHONY: demo test test-lowered test-quant test-eval test-vllm ci build docs style types wheel wheel-cuda bench-smoke cmake matrix tables pocket-table clean
.PHONY: check-abi check-cuda check-cuda-all cuda-compiles
.PHONY: emulate-tests emulate-source emulate-check emulate-ptx80 emulate-ptx90a

demo: build
	$(BIN)/restore-ext demo

test: build
	$(BIN)/python -m pytest

# The tests take longest and one core: they begin first, since nothing is to be built before them, and
# all the rest runs beside them.
ci: build
	$(MAKE) -j$(JOBS) VENV=$(VENV) BUILT=1 \
	  test check-cuda style types wheel cmake bench-smoke test-lowered test-quant

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

ifdef BUILT
build:
else
build: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
endif

style: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

types: build
	$(BIN)/mypy

# A wheel must work where only torch and numpy are: no transformers, no source tree.
wheel: build
	RESTORE_EXT_CUDA=0 $(BIN)/python tools/build_wheel.py dist/cpu
	$(BIN)/python tools/check_wheel.py dist/cpu/*.whl

wheel-cuda: $(VENV)/ready
	RESTORE_EXT_CUDA=1 $(BIN)/python tools/build_wheel.py dist/cuda13
	$(BIN)/python tools/check_wheel.py dist/cuda13/*.whl

# Fetches a CUDA torch once, 530 MB. Not in CI; before a release.
check-abi: wheel-cuda
	$(BIN)/python tools/check_abi.py dist/cuda13/*.whl

# The CUDA kernels where there is no GPU: compiled for every architecture, and run on the CPU.
check-cuda: build cuda-compiles
	$(BIN)/python tools/emulator.py modules source check ptx80 ptx90a $(QUICK)
	$(MAKE) $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$(JOBS)) VENV=$(VENV) \
	  emulate-tests emulate-source emulate-check emulate-ptx80 emulate-ptx90a

# The same with every test on every instance in every mode, then with bugs planted, each of which
# must be caught.
check-cuda-all:
	$(MAKE) VENV=$(VENV) QUICK= check-cuda
	$(BIN)/python tools/mutate_kernels.py

cuda-compiles: $(VENV)/ready
	$(BIN)/python tools/cuda_check.py --sass

emulate-tests:
	$(BIN)/python -m pytest python_tests/emulator

emulate-source:
	$(BIN)/python -m pytest $(OP_TESTS) $(HOOK_TESTS) --emulator $$($(BIN)/python tools/emulator.py source)

emulate-check emulate-ptx80 emulate-ptx90a: emulate-%:
	$(BIN)/python -m pytest $(OP_TESTS) -k "$(if $(QUICK),$(FEW_$*),$(ALL_$*))" \
	  --emulator $$($(BIN)/python tools/emulator.py $* $(QUICK))

cmake: $(VENV)/ready
	$(BIN)/cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Debug \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) > /dev/null
	$(BIN)/cmake --build build/cmake --parallel 2

bench-smoke: build
	$(BIN)/python -m bench.smoke

# Also built, with every link checked and every code block run, by make test.
docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# The hook tests under each supported transformers. Not in CI.
matrix: build build/quant/ready
	$(BIN)/python tools/version_matrix.py

# Writes every table of the README and the docs from bench/results.
tables: build
	$(BIN)/python -m bench.tables

# The AVX-512 levels of the CPU kernels, compiled for AVX2: their own tests, and those of the operators.
test-lowered: build
	$(BIN)/python tools/lowered.py
	RESTORE_EXT_LIBRARY=build/lowered/_C.abi3.so RESTORE_EXT_CPU=avx512_bf16 \
	  $(BIN)/python -m pytest python_tests/test_cpu_levels.py $(filter-out %merge_tokens.py,$(OP_TESTS)) \
	  -k "not generic and not avx2 and not compiles and not well_formed and not gradient and not many"

# Models with 8-bit weights, whose libraries lie in a folder of their own.
build/quant/ready: requirements-quant.txt $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
	  --target build/quant -r requirements-quant.txt
	touch $@

test-quant: build build/quant/ready
	PYTHONPATH=build/quant $(BIN)/python -m pytest python_tests/test_hf_quantized.py

# The plug-in under the real lmms-eval, which lies with its libraries in a folder of its own. Not in CI.
test-eval: build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
	  --target build/eval -r requirements-eval.txt
	PYTHONPATH=build/eval $(BIN)/python -m pytest python_tests/test_lmms_eval.py

# The plug-in under the vLLM that requirements-vllm.txt pins. Not in CI: fetches 1 GB once.
test-vllm: build
	$(BIN)/python tools/vllm_environment.py build/vllm
	build/vllm/bin/python -m pytest python_tests/vllm_plugin

# Accuracy of every method on held-out questions, and the table in the README. Not in CI.
pocket-table: build
	$(BIN)/python -m bench.eval_pocket
	$(BIN)/python -m bench.tables

clean:
	rm -rf build dist *.egg-info restore_ext/*.so
