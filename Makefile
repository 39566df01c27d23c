# Two commands: `make run` gives the table, `make test` checks everything. Both first install what is not there yet.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
INSTALLED := $(VENV)/.installed-$(shell cat pyproject.toml requirements.lock | cksum | cut -d' ' -f1)
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
UV := uv==0.13.8
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export HF_HUB_OFFLINE ?= 1
# every stage is a process of its own, and compiling what it imports would be a third of its start
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run test prefect-demo install params lock clean

run: install
	python -m stages.params
	@mkdir -p data && touch data/started
	dvc repro
	@grep -qs "$$(sha256sum < results/report.md | cut -d' ' -f1)" results/report.html || dvc repro --force --single-item report
	@test results/report.html -nt data/started || cat results/report.md
	@echo "Report: results/report.html"

test: install
	ruff check .
	ruff format --check .
	pyright
	lint-imports
	pytest

# a server, a worker and a run on a shrunken configuration, on this machine; a few minutes
prefect-demo: install
	python -m flows.demo

install: $(INSTALLED)

# torch comes by pip, which takes the machine's own wheel where there is one; the lock holds everything else
$(INSTALLED):
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --disable-pip-version-check $(UV) $(TORCH)
	uv pip install --quiet --no-deps --requirement requirements.lock
	uv pip install --quiet --no-deps --editable .
	rm -f $(VENV)/.installed-*
	touch $@

# params.yaml as conf/ composes it by default, with conf's comments
params: install
	@(sed '/^defaults:/,/^$$/d' conf/config.yaml; for group in family/epd backbone/digits metrics/digits rdpo/shared; do \
		echo; sed '/^# @package/,/^$$/d' conf/$$group.yaml; done) > params.yaml.new
	@mv params.yaml.new params.yaml
	python -m stages.params

lock: install
	uv pip compile pyproject.toml --extra pipeline --group dev --no-emit-package torch --no-header --no-annotate --no-emit-find-links \
		$(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)") --quiet --output-file requirements.lock

clean:
	rm -rf $(VENV) data models results/report.html
