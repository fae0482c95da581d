# The environment lives in .venv; it is made when missing, and again when the lock file has changed.
# Works with GNU make 3.81 and the BSD tools of macOS. A SHELL other than make's own default is needed there: without
# it, make 3.81 starts simple commands itself, and looks for them in the PATH that it was called with.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# What a terminal or a file can't show is written as an escape, by DVC too.
export PYTHONIOENCODING := $(patsubst x%,%,$(firstword $(subst :, ,x$(PYTHONIOENCODING)))):backslashreplace

WRITABLE = @test -w . || { echo "$(CURDIR) can't be written" >&2; exit 2; }

.PHONY: help repro plan report study phases bench docs verdicts test test-bits test-cluster test-chaos lint lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s%s\n", $$1, $$2 }' Makefile

repro: $(READY) ## the whole study: dvc repro
	@python -m phasegate.tools.repair
	dvc repro

plan: $(READY) ## what dvc repro would run now, and why; runs nothing
	@python -m phasegate.tools.plan

report: $(READY) ## figures and the page from the tables that are there; no models needed
	@python -m phasegate.tools.plan --refuse-stale
	@dvc repro --quiet prepare
	@dvc repro --single-item report
	@echo "the page: $(CURDIR)/reports/report.html"

study: $(READY) ## the study on other data: make study DATA=fashion_mnist fills reports/fashion_mnist/; SET: more of dvc exp run's options
	@test -n "$(DATA)" || { echo "study: DATA is empty: name a data set, as in make study DATA=fashion_mnist" >&2; exit 2; }
	@[[ ! ($$(git rev-parse --is-shallow-repository 2>/dev/null) = true || $$PWD = *[![:ascii:]]*) ]] || \
	{ echo "study: DVC's --temp needs a whole clone (git fetch --unshallow) in a folder with an ASCII path" >&2; exit 2; }
	@python -m phasegate.tools.repair
	dvc exp remove --quiet $(DATA) 2>/dev/null || true
	dvc exp run --temp --name $(DATA) --set-param data.name=$(DATA) $(SET)
	rm -rf reports/$(DATA) && mkdir reports/$(DATA)
	ref=$$(git for-each-ref --format='%(refname)' 'refs/exps/**/$(DATA)') && \
	(cd reports && git archive $$ref tables figures decisions.md report.html headline_curve.csv) | tar -x -f - -C reports/$(DATA) && \
	git archive $$ref metrics.json params.yaml dvc.lock | tar -x -f - -C reports/$(DATA)

phases: $(READY) ## every phase as a DVC experiment; other arms: make phases ARMS="p7b2/clone p7b1/noise"
	@python -m phasegate.tools.experiments $(ARMS)

bench: $(READY) ## how fast it is, in ratios, to reports/bench.json; STUDY=1: the whole study too; peers: pip install -e '.[bench]'
	@python -m bench $(if $(STUDY),study)

docs: $(READY) ## the blocks of results in README.md and docs/, from the committed tables
	python -m phasegate.tools.documents

BASE ?= origin/main
verdicts: ## what changed in the verdicts since BASE (origin/main), as Markdown
	@git rev-parse --git-dir >/dev/null && git rev-parse --quiet --verify '$(BASE)^{commit}' >/dev/null || \
	{ echo "verdicts: there is no commit $(BASE) to compare with: set BASE" >&2; exit 2; }
	@echo '```diff' && git --no-pager -c core.quotePath=false diff --relative $(BASE) -- reports/decisions.md reports/*/decisions.md && echo '```'

test: lint ## all checks: format, lint, types, tests
	pytest

test-bits: $(READY) ## every kind of training as on an EPYC, a Haswell and a Skylake, emulated: the same bits (half an hour)
	python -m tests.bits --emulate EPYC-v1 Haswell-v1 Skylake-Server-v1

test-cluster: $(READY) ## trials on a Ray cluster that loses a machine (installs Ray into the environment)
	pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[cluster]'
	pytest --numprocesses=0 -m cluster

test-chaos: $(READY) ## kill the small study 25 times, a worker, a stage and dvc in turn: it must end with the same bits
	pytest --numprocesses=0 -m chaos

lint: $(READY) ## format, lint, imports and types
	ruff format --check .
	ruff check .
	@imports=$$(lint-imports --no-cache --no-logo) || { echo "$$imports"; exit 1; }
	mypy $(if $(NO_COLOR),--no-color-output)

lock: ## write requirements.lock anew from pyproject.toml
	$(WRITABLE)
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet torch==2.13.0 '.[dev]'
	.lock-venv/bin/pip freeze --exclude phasegate | sed 's/+cpu$$//' > requirements.lock
	rm -rf .lock-venv

clean: ## remove the environment, kept trials and caches (data, models and reports stay)
	$(WRITABLE)
	rm -rf $(VENV) .phasegate .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is emptied before it is made again, and a link would be followed: that of another checkout would go.
$(READY): requirements.lock pyproject.toml
	$(WRITABLE)
	@test ! -L $(VENV) || { echo "$(VENV) is a link, and making the environment would empty what it leads to: remove the link" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "phasegate needs Python 3.11 or newer, and $(PYTHON) is %d.%d: set PYTHON" % sys.version_info[:2])'
	@echo "making the environment in $(VENV), which takes minutes" >&2
	@$(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
