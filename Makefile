# Every target sets up what it needs, from a fresh clone: a virtual environment in
# .venv, torch, the tools, the compiled library. Nothing is redone without need.
#
#   make test     the suite                   ARGS="-k combine -x" go to pytest
#   make demo     trains the language models  ARGS="--study" go to examples/train_lm.py
#   make finetune  a small Mixtral: trained, saved, reloaded, LoRA on its experts
#   make lint     ruff, clang-format          make format rewrites
#   make mutants  plants faults; each must be caught by the tests
#   make bench    the layer's benchmarks      ARGS go to benchmarks/bench_layer.py
#   make bench-models  published models' blocks in transformers; ARGS to benchmarks/bench_models.py
#   make peers    installs other libraries' experts in build/peers: half an hour, 14 GB, most
#                 of it kt_kernel's; ARGS="sglang ggml" chooses
#   make bench-peers  the experts beside those; ARGS go to benchmarks/bench_peers.py
#   make wheel    a source archive and from it a wheel, in build/wheel, which is installed in a
#                 fresh venv and runs its self-test there
#   make docs     the documentation as a site, in build/docs; a dead link fails it
#   make kernels  compiles the parts without torch alone, through CMake
#   make clean    removes all of it
#
# Without a GPU:
#   make emulated     the suite over the CUDA kernels, in the emulator
#   make nvcc         nvcc over every kernel: no warning, no spill, resources as committed
#   make cuda-import  the whole extension against CUDA_TORCH, in a venv of its own (6 GB);
#                     it must link, import, hold every op and work on the CPU
#
# On a machine with a GPU and nvcc:
#   make gpu          build, tests, three shapes of the benchmark, compute-sanitizer: 15 minutes;
#                     tests/gpu/run.py says what, and leaves results in build/gpu
#   make gpu-build, gpu-tests, gpu-bench, gpu-sanitizer    parts of it
#   make gpu-sm90     a Hopper's first 15 minutes: build, its instructions, its kernels, the
#                     benchmark beside SonicMoE and torch's grouped_mm, and beside the prediction
#   make gpu-dry      the same steps without a GPU, as far as they go
#
# A torch that PYTHON can import is used as it is; else TORCH is installed.
# TORCH may hold any pip arguments: TORCH="torch==2.13.0 --index-url ...".

PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
QUIET_PIP := -m pip -qq --disable-pip-version-check
PIP := $(RUN) $(QUIET_PIP)
CPP_FILES = $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')

# xdist fills the cores with processes; a thread each is then the fastest.
test: export OMP_NUM_THREADS ?= 1

.PHONY: test demo finetune lint format mutants bench bench-models peers bench-peers wheel docs \
        kernels build clean emulated nvcc cuda-import gpu gpu-build gpu-tests gpu-sanitizer \
        gpu-bench gpu-sm90 gpu-dry

test: build
	$(RUN) -m pytest -n auto $(ARGS)

demo: build
	$(RUN) examples/train_lm.py $(ARGS)

finetune: build
	$(RUN) examples/finetune_mixtral.py $(ARGS)

mutants: build
	$(RUN) tests/mutants/run.py $(ARGS)

bench: build
	$(RUN) benchmarks/bench_layer.py $(ARGS)

bench-models: build
	$(RUN) benchmarks/bench_models.py $(ARGS)

peers: $(VENV)/ready
	cd benchmarks && ../$(RUN) -m peers.install $(ARGS)

bench-peers: build
	$(RUN) benchmarks/bench_peers.py $(ARGS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) tests/import_cycles.py
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

wheel: $(VENV)/ready
	rm -rf build/wheel && mkdir -p build/wheel
	$(RUN) setup.py --quiet sdist --dist-dir build/wheel
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel build/wheel/moe_ext-*.tar.gz
	$(call new-venv,build/wheel/venv)
	build/wheel/venv/bin/python $(QUIET_PIP) install build/wheel/moe_ext-*.whl
	cd build/wheel && venv/bin/python -m moe_ext

# Not --quiet, under which --strict sees no warning. Without the theme's notice of its successor.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/ready
	$(VENV)/bin/mkdocs build --strict

# KERNELS="moe_ext_cpu_kernels moe_ext_emulator" leaves the rest out.
kernels:
	mkdir -p build
	cmake -S . -B build/cmake > build/cmake.log || { cat build/cmake.log; exit 1; }
	cmake --build build/cmake --parallel $(MAX_JOBS) $(if $(KERNELS),--target $(KERNELS))

# ---- without a GPU -----------------------------------------------------------------

# The tests in which a kernel's threads wait for each other, under eight orders of theirs;
# everything under one.
emulated: export OMP_NUM_THREADS = 1
emulated: build
	$(RUN) -m pytest -n auto -q --backend emulated --emulator-seeds 8 -m schedules $(ARGS)
	$(RUN) -m pytest -n auto -q --backend emulated $(ARGS)

nvcc: $(VENV)/ready
	$(RUN) tests/nvcc/gate.py $(ARGS)

CUDA_BUILD := build/cuda
CUDA_RUN := $(CUDA_BUILD)/venv/bin/python
cuda-import: export MOE_EXT_BUILD = cuda
cuda-import: export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0a
cuda-import: $(CUDA_BUILD)/venv/ready
	@echo "building for $$TORCH_CUDA_ARCH_LIST (the compilers' words: $(CUDA_BUILD)/log) ..."
	@$(CUDA_RUN) setup.py build --build-base $(CUDA_BUILD) --build-lib $(CUDA_BUILD)/site > $(CUDA_BUILD)/log 2>&1 \
	    || { tail -n 100 $(CUDA_BUILD)/log; exit 1; }
	PYTHONPATH=$(CUDA_BUILD)/site $(CUDA_BUILD)/venv/bin/pytest -q tests/test_cuda_build.py $(ARGS)

$(CUDA_BUILD)/venv/ready:
	@echo "setting up $(CUDA_BUILD)/venv ($(CUDA_TORCH)) ..."
	@mkdir -p $(CUDA_BUILD)
	@$(PYTHON) -m venv $(CUDA_BUILD)/venv
	@$(CUDA_RUN) $(QUIET_PIP) install $(CUDA_TORCH) 'setuptools>=77' ninja numpy pytest hypothesis
	@touch $@

# ---- on a GPU ------------------------------------------------------------------------

# PYTHON as it is, if it has a torch with CUDA: such a machine may have no network.
GPU_RUN = $(shell $(PYTHON) -c 'import torch; assert torch.version.cuda' 2> /dev/null && echo $(PYTHON) || echo $(RUN))
GPU_PARTS = $(GPU_RUN) tests/gpu/run.py

gpu gpu-build gpu-tests gpu-bench gpu-sanitizer gpu-sm90: $(if $(filter $(RUN),$(GPU_RUN)),$(VENV)/ready)
gpu:
	$(GPU_PARTS) $(ARGS)

gpu-build:
	$(GPU_PARTS) build $(ARGS)

gpu-tests:
	$(GPU_PARTS) build sm90_primitives primitives sm90_kernels kernels gpu_only layer $(ARGS)

gpu-bench:
	$(GPU_PARTS) build bench $(ARGS)

gpu-sanitizer:
	$(GPU_PARTS) build memcheck racecheck synccheck initcheck $(ARGS)

gpu-sm90:
	$(GPU_PARTS) sm90 $(ARGS)

gpu-dry: build
	$(RUN) tests/gpu/run.py --dry --out build/gpu-dry $(ARGS)

build: $(VENV)/ready
	@$(RUN) setup.py build_ext --inplace > build/log 2>&1 || { cat build/log; exit 1; }

# A virtual environment with a torch, in the folder $(1).
define new-venv
	@echo "setting up $(1) ($(TORCH) unless $(PYTHON) has a torch) ..."
	@$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2> /dev/null && echo --system-site-packages) $(1)
	@$(1)/bin/python $(QUIET_PIP) install --upgrade pip
	@$(1)/bin/python -c 'import torch' 2> /dev/null || $(1)/bin/python $(QUIET_PIP) install $(TORCH)
endef

$(VENV)/torch:
	$(call new-venv,$(VENV))
	@touch $@

$(VENV)/ready: $(VENV)/torch pyproject.toml
	@echo "installing the tools and compiling the library (later only what changed) ..."
	@$(PIP) install 'setuptools>=77' ninja
	@$(PIP) install --no-build-isolation --editable '.[test,demo,lint,docs,nvcc]'
	@touch $@

clean:
	rm -rf $(VENV) build dist moe_ext.egg-info moe_ext/_C.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
