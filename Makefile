# Everyday targets; `make` lists them. Each sees to what it needs first (scripts/setup.sh).
.DEFAULT_GOAL := help
.SUFFIXES:
MAKEFLAGS += --no-print-directory

JOBS ?= $(shell nproc)
PREFIX ?= /usr/local
FUZZ_SECONDS ?= 300
RUN_LENGTHS := 1300,547,2048,963,271,3063

# $(call compile,PRESET)
compile = cmake --preset $(1) >/dev/null && cmake --build --preset $(1) -j $(JOBS)

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/#/' | \
	  awk -F'# *' '{ printf "  make %-14s %s\n", $$1, $$2 }'

.PHONY: build
build: ## optimised build in build/release
	@scripts/setup.sh test
	@$(call compile,release)

.PHONY: run
run: ## a ragged prefill end to end: time, tokens/s, backend, error against gold
	@scripts/setup.sh build
	@cmake -S . -B build/run -DCMAKE_BUILD_TYPE=Release -DFLASHKDA_TESTS=OFF >/dev/null
	@cmake --build build/run -j $(JOBS)
	@build/run/flashkda make --lens $(RUN_LENGTHS) --heads 8 --dim 128 -o build/run/input.safetensors
	@build/run/flashkda run build/run/input.safetensors -o build/run/output.safetensors --check

.PHONY: test
test: ## every test
	@JOBS=$(JOBS) scripts/test.sh

.PHONY: asan ubsan tsan
asan: ## C tests under AddressSanitizer and UndefinedBehaviorSanitizer, float conversions and divisions included
ubsan: ## C tests under UndefinedBehaviorSanitizer alone
tsan: ## pool tests under ThreadSanitizer
asan ubsan tsan:
	@scripts/setup.sh test
	@$(call compile,$@)
	@ctest --preset $@ -j $(JOBS)

.PHONY: coverage
coverage: ## line and branch coverage of the C tests, build/coverage/index.html
	@scripts/setup.sh test coverage
	@$(call compile,coverage)
	@find build/coverage -name '*.gcda' -delete
	@ctest --preset coverage -j $(JOBS)
	@build/venv-tools/bin/gcovr -r . --gcov-suspicious-hits-threshold 0 --filter src/ --filter tools/ build/coverage -j $(JOBS) \
	  --print-summary --html-details build/coverage/index.html

.PHONY: fuzz
fuzz: ## libFuzzer, FUZZ_SECONDS (300) for each target
	@scripts/setup.sh fuzz
	@cmake --preset fuzz -DFLASHKDA_FUZZ_SECONDS=$(FUZZ_SECONDS) >/dev/null
	@cmake --build --preset fuzz -j $(JOBS)
	@ctest --preset fuzz -j $(JOBS) --verbose; status=$$?; \
	  cmake --preset fuzz -UFLASHKDA_FUZZ_SECONDS >/dev/null; exit $$status

.PHONY: format format-check tidy
format: ## clang-format over every C file
	@scripts/format.sh
format-check: ## fail where clang-format would change something
	@scripts/format.sh --check
tidy: ## clang-tidy, no warning allowed
	@JOBS=$(JOBS) scripts/tidy.sh

.PHONY: abi abi-update
abi: ## compare the ABI with abi/flashkda.abi
	@scripts/abi.sh
abi-update: ## record the ABI in abi/flashkda.abi
	@scripts/abi.sh --update

.PHONY: neon
neon: ## cross build for 64-bit Arm, tests under qemu-user
	@scripts/setup.sh neon
	@$(call compile,neon)
	@ctest --preset neon -j $(JOBS)

.PHONY: bench
bench: build ## time this machine's kernels and their peers: bench/results/cpu-<isa>.json, tables
	@test -x build/venv-bench/bin/python || python3 -m venv build/venv-bench
	@build/venv-bench/bin/pip install --disable-pip-version-check --quiet -r bench/requirements.txt
	@build/venv-bench/bin/python bench/cpu.py
	@build/venv-bench/bin/python bench/table.py

.PHONY: gpu-check
gpu-check: ## on a GPU: case table, Python tests, sanitizers; build/gpu-check.json
	@JOBS=$(JOBS) scripts/gpu_check.sh

.PHONY: wheel
wheel: ## Python wheel in dist/
	@scripts/wheel.sh

.PHONY: docs
docs: ## HTML documentation in build/docs
	@scripts/setup.sh docs
	@build/venv-docs/bin/sphinx-build -q -W -b html docs build/docs
	@echo build/docs/index.html

.PHONY: install
install: ## header, libraries, command line, pkg-config and CMake files below PREFIX (/usr/local)
	@scripts/setup.sh build
	@cmake -S . -B build/install -DCMAKE_BUILD_TYPE=Release -DFLASHKDA_TESTS=OFF \
	  -DCMAKE_INSTALL_PREFIX=$(PREFIX) >/dev/null
	@cmake --build build/install -j $(JOBS)
	@cmake --install build/install

.PHONY: clean
clean: ## remove build/ and dist/
	rm -rf build dist
