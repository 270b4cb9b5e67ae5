# make demo [PHOTOS=folder]: run the whole system on this machine.  make test: all tests.  make check: format, lint, types.
# make bench: the benchmarks.  make faults [SEED=n]: ten minutes of random faults under load, and their cost.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
PROMETHEUS := $(BIN)/prometheus
CHROMIUM := $(BIN)/chromium

.PHONY: demo test faults check bench readme locks clean

demo: $(READY)
	$(BIN)/cutfleet demo $(PHOTOS)

test: $(READY) $(PROMETHEUS) $(CHROMIUM)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder  # tests mostly wait; a file shares servers

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

faults: $(READY)
	$(BIN)/python -m tests.faults

bench: $(READY)
	$(BIN)/python -m tests.bench

readme: $(READY)
	$(BIN)/python tests/support/readme.py

locks: $(READY)
	PATH=$(abspath $(BIN)):$$PATH infra/docker/lock.sh

clean:
	rm -rf $(VENV) demo-output

$(PROMETHEUS): | $(READY)
	tests/support/get-prometheus.sh $(BIN)

$(CHROMIUM): | $(READY)
	tests/support/get-chromium.sh $(BIN)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[worker,local,test]'
	touch $@
