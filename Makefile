# Two commands are enough: `make demo` and `make test`; each does the set-up it needs.

PYTHON ?= python3
VENV := .venv
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
READY := $(VENV)/.ready
PEERS := .peers
CLIP_RETRIEVAL := .clip-retrieval

.PHONY: help setup demo test test-all check format docs bench audit fashion12k peers clip-retrieval

help:
	@echo "make demo        the whole pipeline on rendered photos: table and page in runs/demo"
	@echo "make test        the default tests (10 minutes); options: make test PYTEST=\"-k loader\""
	@echo "make test-all    with the slow ones (an hour)"
	@echo "make check       ruff, mypy"
	@echo "make format      ruff, in place"
	@echo "make docs        docs/modules.md from the docstrings; checks links and line lengths"
	@echo "make bench       quick benchmarks of the loader and the loss"
	@echo "make audit       known vulnerabilities of the pinned packages (asks pypi.org)"
	@echo "make fashion12k  Table 1 on real photos, all stages: FASHION12K=FOLDER make fashion12k (half an hour)"
	@echo "make peers       other loaders to compare with, in their own environment ($(PEERS), 6 GB)"
	@echo "make clip-retrieval  that peer of scoring, likewise ($(CLIP_RETRIEVAL), 6 GB)"
	@echo "make setup       the virtual environment alone"

setup: $(READY)

# The checks come first, so that a missing Debian package is one line instead of a build log.
$(READY): pyproject.toml constraints.txt
	@missing=""; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sysconfig; raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
	  || missing="$$missing python3-dev"; \
	if [ -n "$$missing" ]; then echo "missing Debian packages; run: sudo apt-get install -y$$missing" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "installing Python packages into $(VENV) (a few minutes)"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: setup
	$(RUN) vlal demo

test: setup
	$(RUN) python -m pytest $(PYTEST)

test-all: setup
	$(RUN) python -m pytest -m "not nightly" $(PYTEST)

format: setup
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

docs: setup
	$(RUN) python docs/build.py
	$(RUN) python -m pytest -q tests/test_docs.py

bench: setup
	$(RUN) python benchmarks/loader/loader.py --quick
	$(RUN) python benchmarks/loss/selective_loss.py --quick

check: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

# In an environment of its own, so that the auditor's packages are not ours; nothing is installed.
audit: .audit/.ready
	.audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

.audit/.ready:
	test -x .audit/bin/python || $(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	@touch $@

fashion12k: CONFIG := --config configs/fashion12k.yaml
fashion12k: setup
	$(RUN) vlal run --to merge $(CONFIG)
	$(RUN) vlal experiments table1 $(CONFIG)

# Only for benchmarks/loader/loader.py; the peers hold packages at older versions than ours.
peers: $(PEERS)/.ready

$(PEERS)/.ready: benchmarks/peers/constraints.txt
	@echo "installing the peers into $(PEERS) (a few minutes)"
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/peers/constraints.txt torch torchvision numpy pillow simplejpeg opencv-python-headless webdataset litdata mosaicml-streaming
	@touch $@

# Only for benchmarks/scoring/score.py. setuptools: it imports pkg_resources, which later ones lack.
clip-retrieval: $(CLIP_RETRIEVAL)/.ready

$(CLIP_RETRIEVAL)/.ready: benchmarks/peers/clip_retrieval_constraints.txt
	@echo "installing clip-retrieval into $(CLIP_RETRIEVAL) (a few minutes)"
	test -x $(CLIP_RETRIEVAL)/bin/python || $(PYTHON) -m venv $(CLIP_RETRIEVAL)
	$(CLIP_RETRIEVAL)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/peers/clip_retrieval_constraints.txt torch torchvision "setuptools<81" clip-retrieval
	@touch $@
