# make run: set everything up and run the whole pipeline.   make test: set everything up and check everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

LOWEST := .venv-lowest
DOCS := .venv-docs
# files of tests are shared among the cores
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: run test test-faults test-sanitized test-lowest test-transformers check docs setup lock bench bench-real bench-gpu clean

run: setup
	$(BIN)/python scripts/run.py $(ARGS)

test: check
	$(BIN)/python $(PYTEST) $(ARGS)

# a hundred kills, and every fault and mutation; a quarter of an hour
test-faults: setup
	SPARSEFINDER_KILLS=100 $(BIN)/python -m pytest tests/faults -s $(ARGS)

# the tests of the C++ compiled with the address and undefined-behaviour sanitizers, which end the process at the first fault.
# Python is not compiled with them, so their libraries come first (and that of C++, whose exceptions they watch); what Python and
# torch keep until they end is no leak
test-sanitized: setup
	SPARSEFINDER_SANITIZE=address,undefined OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    $(BIN)/python -m pytest tests/executors/test_native.py tests/executors/test_dense.py tests/executors/test_support_lists.py tests/executors/test_native_boundary.py tests/executors/test_tailed.py tests/predictors/test_tree.py --timeout 3600 $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# written last: an interrupted set-up is done again
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed, this is ' + sys.version.split()[0] + ': make PYTHON=python3.11') if sys.version_info < (3, 10) else 0"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(READY)

# the newest versions that pyproject.toml allows, for Python 3.10 and later; needs uv
lock:
	printf 'torch==2.13.0\n' > .torch-constraint
	( head -n 2 requirements.lock; uv pip compile --universal --python-version 3.10 --extra pipeline --group dev pyproject.toml \
	    --constraint .torch-constraint --quiet --no-annotate --no-header | grep -vE '^(nvidia-|cuda-)' ) > requirements.new
	mv requirements.new requirements.lock
	rm .torch-constraint

# the tests with the lowest versions that pyproject.toml allows (of tools for development the newest); needs uv
test-lowest:
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	uv pip compile --quiet --resolution lowest-direct --extra launchers --python $(LOWEST)/bin/python \
	    --no-annotate --no-header pyproject.toml --output-file $(LOWEST)/lowest.txt
	uv pip compile --quiet --extra pipeline --group dev --constraint $(LOWEST)/lowest.txt --python $(LOWEST)/bin/python \
	    --no-annotate --no-header pyproject.toml --output-file $(LOWEST)/all.txt
	grep -vE '^(nvidia-|cuda-)' $(LOWEST)/all.txt > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --requirement $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(LOWEST)/bin/python $(PYTEST) $(ARGS)

# transformers' own model tests on LSG models, fetched by pip into a folder that is thrown away; half an hour
test-transformers: setup
	$(BIN)/python benchmarks/transformers_tests.py $(ARGS)

# the documentation site, in build/site; a link that leads nowhere is an error
docs:
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet 'pip>=25.1'
	$(DOCS)/bin/python -m pip install --quiet --group docs
	$(DOCS)/bin/mkdocs build --strict

# ratios measured side by side in one run, on a quiet machine; half an hour. docs/explanation/measured.md quotes the file that this writes
bench: setup
	rm -f benchmarks/results.new
	for each in normalizers entmax_steps dense lsg learning stages; do \
	    echo "measuring: $$each"; $(BIN)/python benchmarks/$$each.py >> benchmarks/results.new || exit 1; done
	mv benchmarks/results.new benchmarks/results.md
	$(BIN)/python benchmarks/quote.py

# a whole encoder, and attention on what it attends with, for README and measured.md too: make bench-real MODEL=FOLDER TRAIN=FILE TEST=FILE
bench-real: setup
	$(BIN)/python benchmarks/encoder.py --model $(MODEL) --train $(TRAIN) --test $(TEST) > benchmarks/real.new
	$(BIN)/python benchmarks/bucketed.py --model $(MODEL) --train $(TRAIN) --test $(TEST) >> benchmarks/real.new
	$(BIN)/python benchmarks/growth.py --model $(MODEL) --train $(TRAIN) --test $(TEST) >> benchmarks/real.new
	mv benchmarks/real.new benchmarks/real.md
	$(BIN)/python benchmarks/quote.py

# needs CUDA, triton, and for all rows of its table adasplash
bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) $(LOWEST) $(DOCS) build runs .pytest_cache .mypy_cache .ruff_cache
