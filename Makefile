# make demo    sets everything up and runs the main job on embedded data (DATA=folder for your own)
# make test    sets everything up and runs all checks and tests
# make check   lint, types and the fast tests only
# make gpu-check  on a machine with a GPU: the gpu tests, a benchmark of every part and compute-sanitizer, results to
#              benchmarks/results/ (GPU_CHECK_ARGS="--help" names the steps and says how to choose)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
DEMO_ARGS ?=
GPU_CHECK_ARGS ?=
# Two at a time, a file in one process: session fixtures are made once in each.
PYTEST_ARGS ?= -n 2 --dist loadfile
# DALI's threads share the CPU cores with torch's, whose OpenMP threads must not spin while they wait.
export OMP_WAIT_POLICY ?= PASSIVE

# What the native build needs, since it runs without build isolation (see docs/install.md).
BUILD_NEEDS := scikit-build-core cmake ninja nvidia-dali-cuda130 nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl

.PHONY: setup demo test check lint gpu-check clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt CMakeLists.txt $(shell find shards/csrc pipeline/corruptions/csrc model/codebook/csrc -type f 2>/dev/null)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "vqsa needs Python 3.11 to 3.13, found $$($(PYTHON) --version); say make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "no virtual environment: on Debian and Ubuntu say apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt $(BUILD_NEEDS)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[demo,test]'
	# Frost textures and test oracle; its own dependency list would bring a second OpenCV that needs a display.
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps imagecorruptions
	touch $@

demo: setup
	$(BIN)/python tools/demo.py $(if $(DATA),--data $(DATA)) $(DEMO_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

clean:
	rm -rf build $(VENV)/ready shards/*.so pipeline/corruptions/*.so model/codebook/*.so
