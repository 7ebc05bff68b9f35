# Everything from a bare checkout: Python 3.11 or later, a C++ compiler and make are all that must be there.
# `make help` lists the targets.

# The first Python that is new enough; PYTHON=... names another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --quiet --quiet --disable-pip-version-check
CONSTRAINTS := $(VENV)/constraints.txt
export PATH := $(CURDIR)/$(BIN):$(PATH)

CORE_SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/*) \
	$(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CMAKE_NEW = cmake -S . -B build/$(1) $(if $(wildcard build/$(1)/CMakeCache.txt),,-G Ninja)
CTEST = ctest --output-on-failure --no-tests=error --parallel $(shell getconf _NPROCESSORS_ONLN) --test-dir

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow setup cpp-test asan tsan mutations cuda stress faults fuzz package lint format docs bench stats stubs clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.built ## set up, then fine-tune a small real model streamed from disk (a few minutes)
	$(BIN)/python examples/demo/demo.py

test: $(VENV)/.built ## set up, then run the Python tests
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.built ## the long tests
	$(BIN)/pytest -m slow

setup: $(VENV)/.built ## create .venv, install what is pinned, build the core

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or later is needed, and none was found: name one with PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or later is needed, and $(PYTHON) is $$("$(PYTHON)" --version 2>&1)"; exit 1; }
	@echo "== creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) -m venv failed: on Debian and Ubuntu, install python3-venv"; exit 1; }

# torch goes first, since its build for the platform decides what else is needed: one with CUDA brings a triton of its own.
# Of 15,000 modules, those are compiled that are imported.
$(VENV)/.installed: constraints.txt pyproject.toml tools/requirements.py | $(VENV)/bin/python
	@echo "== installing torch"
	@grep -vE '^(triton|nvidia-)' constraints.txt > $(CONSTRAINTS)
	@$(PIP) install --no-compile -c $(CONSTRAINTS) $$(grep '^torch==' constraints.txt) packaging
	@$(BIN)/python -c 'import triton' 2>/dev/null || grep '^triton==' constraints.txt >> $(CONSTRAINTS)
	@echo "== installing the other packages"
	@$(PIP) install --no-compile -c $(CONSTRAINTS) $$($(BIN)/python tools/requirements.py)
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(CORE_SOURCES)
	@echo "== building distzo2"
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'import distzo2_core; print("built:", distzo2_core.build_info())'
	@touch $@

cpp-test: $(VENV)/.built ## the C++ tests
	$(call CMAKE_NEW,core) && cmake --build build/core
	$(CTEST) build/core

asan: $(VENV)/.installed ## the C++ tests under the address and undefined-behaviour sanitizers
	$(call CMAKE_NEW,asan) -DDISTZO2_SANITIZE=address $(CMAKE_OPTIONS) && cmake --build build/asan
	$(CTEST) build/asan

tsan: $(VENV)/.installed ## the C++ tests under the thread sanitizer
	$(call CMAKE_NEW,tsan) -DDISTZO2_SANITIZE=thread $(CMAKE_OPTIONS) && cmake --build build/tsan
	$(CTEST) build/tsan

stress: $(VENV)/.built ## long trainings through poisoned slots with random delays, against resident weights (minutes)
	$(call CMAKE_NEW,core) && cmake --build build/core --target training_stress_test
	DISTZO2_STRESS_STEPS=10000 build/core/tests/training_stress_test
	$(BIN)/pytest tests/streaming/test_stress.py

faults: $(VENV)/.built ## disks that fail, kills and power cuts at any instant, damaged files, limits on memory, failing threads and drivers (an hour)
	$(call CMAKE_NEW,core) && cmake --build build/core
	$(CTEST) build/core -R 'block_file|copy_engine|host_pool'
	$(BIN)/pytest tests/faults/test_limits.py tests/weights/test_store.py tests/optim/test_safety.py
	DISTZO2_NUM_KILLS=200 DISTZO2_ALL_FAULTS=1 $(BIN)/pytest --timeout=0 -s \
		tests/faults/test_kills.py tests/record/test_weight_file.py tests/faults/test_disk_faults.py tests/faults/test_power_cut.py

FUZZ_SECONDS ?= 160

fuzz: $(VENV)/.built ## fuzz the readers of journals and checkpoints, nine targets of FUZZ_SECONDS each, then the program on 2000 mutated inputs (40 minutes)
	DISTZO2_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/pytest -s -v tests/faults/test_fuzz.py
	DISTZO2_NUM_MUTANTS=2000 $(BIN)/pytest -s -v tests/faults/test_command_fuzz.py

mutations: $(VENV)/.installed ## leave out each ordering of copy engine and block file in turn: a test must notice
	$(call CMAKE_NEW,mutations) -DDISTZO2_MUTATIONS=ON -DDISTZO2_CUDA=0 && \
		cmake --build build/mutations --target copy_engine_cpu_test copy_engine_cuda_test block_file_crash_test
	$(BIN)/python tools/check_mutations.py build/mutations

# A machine without a CUDA toolkit gets the compiler as Python packages, in a folder of its own.
NVCC_HOME := build/nvcc/nvidia/cu13
NVCC := $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || echo $(NVCC_HOME)/bin/nvcc)

$(NVCC_HOME)/bin/nvcc: | $(VENV)/.installed
	@echo "== installing nvcc"
	@$(PIP) install --no-deps --target build/nvcc $$(grep '^nvidia-' constraints.txt)

cuda: $(NVCC) $(VENV)/.installed ## compile every .cu for sm_80, sm_90, sm_100 and PTX, link the extension, count instructions
	CUDACXX=$(abspath $(NVCC)) DISTZO2_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -c 'import distzo2_core as core; info = core.build_info(); print(info); assert info["cuda"]'
	$(BIN)/python tools/sass_counts.py build/core/libdistzo2_kernels.a --check

package: $(VENV)/.built ## build the wheel and run it away from the checkout
	tools/check_package.sh $(BIN)/python

lint: $(VENV)/.installed ## check style: ruff, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.installed ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(VENV)/.installed ## build the documentation as a site into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open build/site/index.html; its search needs a server: python -m http.server -d build/site"

bench: $(VENV)/.built ## measure kernels and copies on this machine, into bench/results
	$(BIN)/python bench/bench_kernels.py
	$(BIN)/python bench/bench_copy.py
	$(BIN)/python bench/bench_step.py time --json bench/results/steps.jsonl

stats: $(VENV)/.built ## test the statistics of 10^9 normals and signs (minutes), into bench/results/noise_stats.json
	$(BIN)/python tools/noise_stats.py

stubs: $(VENV)/.built ## write the type stubs of the compiled extension (a test checks that they are current)
	$(BIN)/python tools/stubs.py

clean: ## remove what was built
	rm -rf build dist *.egg-info distzo2_core/_C*.so $(VENV)/.built

distclean: clean ## remove what was built, and .venv
	rm -rf $(VENV)
