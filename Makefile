# Everything is made below .venv/ and build/. Targets and prerequisites are relative paths, since make cannot hold a
# path with a space in it, and a checkout may lie in one. GNU make 3.81 (macOS) is enough.
#
#   .venv/bin/pip -> build/venv/requirements.txt -> .venv/stamps/package -> .venv/stamps/{test,lint}
#
# build/venv holds what compiles the package (scikit-build-core, nanobind; cmake and ninja where the machine has
# none), so that .venv holds only what runs it. pip's build isolation would put these into a folder with a new name
# each time, and CMake would compile every file again.

PYTHON ?= python3
EXAMPLE ?= examples/stdlib-lm/w4a16-asym

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_USER := 0
unexport PYTHONPATH PYTHONHOME

# Where the system's Python was replaced by another, .venv points nowhere.
$(shell [ ! -L .venv/bin/python ] || [ -e .venv/bin/python ] || rm -rf .venv)

pip := .venv/bin/python -m pip --quiet
build_pip := $(pip) --python build/venv/bin/python

# The folders too: their times show that a file went away.
sources := CMakeLists.txt pyproject.toml \
	$(shell find native src \( -name __pycache__ -o -name '.*' -o -name '*~' -o -name '*.so' \) -prune -o -print)
native_build = build/native$(SANITIZE:%=-%)
native_options = -DFEWBITS_SANITIZE=$(SANITIZE)
native_sources = $(shell find native -name '*.h' -o -name '*.cc')

.PHONY: help demo test test-native test-aarch64 test-peers bench lint fix dist clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo 'PYTHON=python3.13 and CXX=clang++ choose the interpreter and the compiler when .venv is made.'

demo: .venv/stamps/package ## install into .venv and generate text from the example checkpoint
	@.venv/bin/fewbits demo $(EXAMPLE)

test: .venv/stamps/test ## run the tests; ARGS='tests/test_x.py -k name' for some of them
	@.venv/bin/python -m pytest $(ARGS)

test-native: ## compile and run the native tests, without Python; SANITIZE=address,undefined or SANITIZE=thread
test-aarch64: ## the native tests on 64-bit ARM, emulated; needs Debian's g++-aarch64-linux-gnu and qemu-user

test-aarch64: native_build = build/native-aarch64
test-aarch64: native_options = -DCMAKE_TOOLCHAIN_FILE=native/aarch64.cmake
test-native test-aarch64: build/venv/requirements.txt
	@PATH="$$PWD/build/venv/bin:$$PATH" && export PATH && \
		cmake -S . -B $(native_build) -G Ninja -DFEWBITS_TESTS=ON $(native_options) >$(native_build).log && \
		cmake --build $(native_build) && \
		ctest --test-dir $(native_build) --output-on-failure --no-tests=error --parallel 2

test-peers: .venv-peers/installed ## make the fixtures again with the real tools and compare; needs gigabytes for torch
	@.venv-peers/bin/python -m pytest -W default tests/peers $(ARGS)

bench: .venv/stamps/package ## measure how fast the example decodes and prefills, beside what the machine allows
	@.venv/bin/fewbits bench $(EXAMPLE)

lint: .venv/stamps/lint ## check style and types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy src/fewbits
	@.venv/bin/clang-format --dry-run --Werror $(native_sources)

fix: .venv/stamps/lint ## put the style right where that can be done by a program
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .
	@.venv/bin/clang-format -i $(native_sources)

dist: build/venv/requirements.txt ## make the source archive, and the wheel from it, in dist/
	@rm -rf dist
	@$(build_pip) install build
	@build/venv/bin/python -m build --outdir dist .

clean: ## remove all that was made
	rm -rf .venv .venv-peers build dist .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	@sh tools/check_build_tools.sh "$(PYTHON)"
	@echo 'Making .venv' >&2
	@"$(PYTHON)" -m venv --without-pip --clear .venv

.venv/bin/pip: .venv/bin/python
	@.venv/bin/python -m ensurepip --default-pip >.venv/pip.log 2>&1 || { cat .venv/pip.log >&2; exit 1; }
	@touch $@

build/venv/pyvenv.cfg: .venv/bin/pip
	@.venv/bin/python -m venv --without-pip --clear build/venv

build/venv/requirements.txt: pyproject.toml build/venv/pyvenv.cfg tools/build_requirements.py
	@.venv/bin/python tools/build_requirements.py static >$@.part
	@$(build_pip) install --requirement $@.part
	@build/venv/bin/python tools/build_requirements.py dynamic >>$@.part
	@$(build_pip) install --requirement $@.part
	@mv $@.part $@

.venv/stamps/package: build/venv/requirements.txt $(sources)
	@echo 'Compiling fewbits and installing it into .venv' >&2
	@rm -rf build/wheel
	@$(build_pip) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	@$(pip) install --force-reinstall --no-deps build/wheel/*.whl
	@$(pip) install build/wheel/*.whl
	@mkdir -p $(@D); touch $@

.venv/stamps/test .venv/stamps/lint: .venv/stamps/package
	@set -- build/wheel/*.whl; $(pip) install "./$$1[$(@F)]"
	@touch $@

# torch first and alone: what comes after it is then content with the build that is there.
.venv-peers/installed: tools/fixtures-requirements.txt
	@sh tools/check_build_tools.sh "$(PYTHON)"
	@"$(PYTHON)" -m venv --clear .venv-peers
	@.venv-peers/bin/python -m pip --quiet install "$$(grep '^torch==' tools/fixtures-requirements.txt)"
	@.venv-peers/bin/python -m pip --quiet install --requirement tools/fixtures-requirements.txt
	@touch $@
