# Every target sets up what it needs, from a fresh clone: a virtual environment in
# .venv, torch, the tools, the compiled library. Nothing is redone without need.
#
#   make test     the suite                   ARGS="-k combine -x" go to pytest
#   make demo     trains the language models  ARGS="--study" go to examples/train_lm.py
#   make lint     ruff, clang-format          make format rewrites
#   make mutants  plants faults; each must be caught by the tests
#   make bench    the layer's benchmarks      ARGS go to benchmarks/bench_layer.py
#   make installed  builds a source archive, installs it elsewhere, runs its self-test
#   make kernels  compiles the parts without torch alone, through CMake
#   make clean    removes all of it
#
# A torch that PYTHON can import is used as it is; else TORCH is installed.
# TORCH may hold any pip arguments: TORCH="torch==2.13.0 --index-url ...".

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip -qq --disable-pip-version-check
CPP_FILES = $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')

# xdist fills the cores with processes; a thread each is then the fastest.
test: export OMP_NUM_THREADS ?= 1

.PHONY: test demo lint format mutants bench installed kernels build clean

test: build
	$(RUN) -m pytest -n auto $(ARGS)

demo: build
	$(RUN) examples/train_lm.py $(ARGS)

mutants: build
	$(RUN) tests/mutants/run.py $(ARGS)

bench: build
	$(RUN) benchmarks/bench_layer.py $(ARGS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

installed: $(VENV)/ready
	rm -rf build/installed && mkdir -p build/installed
	$(RUN) setup.py --quiet sdist --dist-dir build/installed
	$(PIP) install --no-build-isolation --no-deps --target build/installed/site build/installed/moe_ext-*.tar.gz
	cd build/installed/site && ../../../$(RUN) -m moe_ext

kernels:
	mkdir -p build
	cmake -S . -B build/cmake > build/cmake.log || { cat build/cmake.log; exit 1; }
	cmake --build build/cmake --parallel $(MAX_JOBS)

build: $(VENV)/ready
	@$(RUN) setup.py build_ext --inplace > build/log 2>&1 || { cat build/log; exit 1; }

$(VENV)/torch:
	@echo "setting up $(VENV) ($(TORCH) unless $(PYTHON) has a torch) ..."
	@$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2> /dev/null && echo --system-site-packages) $(VENV)
	@$(PIP) install --upgrade pip
	@$(RUN) -c 'import torch' 2> /dev/null || $(PIP) install $(TORCH)
	@touch $@

$(VENV)/ready: $(VENV)/torch pyproject.toml
	@echo "installing the tools and compiling the library (later only what changed) ..."
	@$(PIP) install 'setuptools>=77' ninja
	@$(PIP) install --no-build-isolation --editable '.[test,demo,lint]'
	@touch $@

clean:
	rm -rf $(VENV) build dist moe_ext.egg-info moe_ext/_C.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
