# Needs Python 3.11+ and make; everything else goes into .venv. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
MODEL ?= smollm2-135m
DATA ?= embedded
STORE ?= stores/$(notdir $(MODEL))
EXP ?= runs/$(notdir $(MODEL))
HEAD ?= $(EXP)/best
OUT ?= heads/$(notdir $(MODEL))
RUNS ?= runs
PROMPTS ?=
SWEEP ?= sweep.toml
ENDPOINT ?=
SERVED ?= $(MODEL)
ANSWERS ?= answers/$(notdir $(MODEL)).jsonl
ARGS ?=
CHIP ?= $(if $(wildcard /dev/accel0 /dev/vfio/0),tpu,$(if $(wildcard /dev/nvidia0),gpu))
EYAS = .venv/bin/eyas
READY = .venv/ready

.PHONY: help demo test test-slow regenerate prepare dump train sweep compare report eval speculate export serve-check bench bench-codecs targets lint lock clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  MODEL=$(MODEL) DATA=$(DATA) STORE=$(STORE) EXP=$(EXP) HEAD=$(HEAD) RUNS=$(RUNS) SWEEP=$(SWEEP)"
	@echo "  ARGS=\"--option value\" passes options on; .venv/bin/eyas VERB --help lists them."

demo: $(READY) ## the whole way on the embedded model, sized for 10 minutes on 2 cores
	@$(EYAS) demo $(ARGS)

test: $(READY) ## the tests, on all cores
	@.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

test-slow: $(READY) ## also the tests that take minutes or download
	@.venv/bin/python -m pytest -m 'slow or not slow' $(ARGS)

regenerate: $(READY) ## the target's own answers to DATA by the servers ENDPOINT, or by MODEL here -> ANSWERS
	@$(EYAS) regenerate $(foreach d,$(DATA),--data '$(d)') $(foreach e,$(ENDPOINT),--endpoint '$(e)') \
	  $(if $(ENDPOINT),--served-model '$(SERVED)',--model $(MODEL)) --out '$(ANSWERS)' $(ARGS)

prepare: $(READY) ## DATA -> packed rows in STORE
	@$(EYAS) prepare --model $(MODEL) --store $(STORE) $(foreach d,$(DATA),--data '$(d)') $(ARGS)

dump: $(READY) ## rows of STORE (prepared from DATA if there are none) -> features, by MODEL
	@$(EYAS) dump --model $(MODEL) --store $(STORE) $(foreach d,$(DATA),--data '$(d)') $(ARGS)

train: $(READY) ## STORE -> a head in EXP
	@$(EYAS) train --model $(MODEL) --store $(STORE) --out $(EXP) $(ARGS)

sweep: $(READY) ## STORE -> the heads of the file SWEEP in runs/SWEEP, from one stream, and a comparison
	@$(EYAS) sweep $(SWEEP) --model $(MODEL) --store $(STORE) $(ARGS)

compare: $(READY) ## the runs in RUNS side by side -> a table and runs/compare.html
	@$(EYAS) compare $(RUNS) $(ARGS)

report: $(READY) ## the run EXP -> a table and EXP/report.html
	@$(EYAS) report $(EXP) $(ARGS)

eval: $(READY) ## HEAD (EXP/best) on the held-out rows of STORE
	@$(EYAS) eval --head $(HEAD) --store $(STORE) $(ARGS)

speculate: $(READY) ## HEAD with MODEL as a server decodes: PROMPTS, else the held-out rows of STORE
	@$(EYAS) speculate --model $(MODEL) --head $(HEAD) \
	  $(if $(PROMPTS),$(foreach p,$(PROMPTS),--prompts '$(p)'),--store $(STORE)) $(ARGS)

export: $(READY) ## HEAD -> OUT, a checked folder that servers load
	@$(EYAS) export --head $(HEAD) --store $(STORE) --out $(OUT) $(ARGS)

serve-check: $(READY) ## HEAD in a real vLLM on this CPU (set up once, 6 GB), beside our own figures
	@$(EYAS) serve-check $(HEAD) --model $(MODEL) --store $(STORE) $(ARGS)

bench: $(READY) ## speed and memory figures -> runs/bench.json
	@$(EYAS) bench $(ARGS)

bench-codecs: $(READY) ## ways of storing: acceptance against bytes a token -> runs/codecs/table.md
	@$(EYAS) bench-codecs --model $(MODEL) $(foreach d,$(DATA),--data '$(d)') $(ARGS)

targets: $(READY) ## the supported families and recipes
	@$(EYAS) targets $(ARGS)

lint: $(READY) ## style and format
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

lock: ## pins the newest versions anew (needs uv)
	@uv pip compile pyproject.toml --universal --generate-hashes --python-version 3.11 --extra dev \
	  --upgrade --no-emit-index-url --no-header --no-annotate --quiet -o requirements.lock

clean: ## removes .venv; stores, runs and downloads stay
	@rm -rf .venv

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); use make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up .venv (once; a few minutes)" >&2
	@$(PYTHON) -m venv .venv || { echo "the venv module is missing; install python3-venv" >&2; exit 2; }
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@# where there is a TPU or an NVIDIA GPU: the plugin that the pinned jax asks for
	@[ -z "$(CHIP)" ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[$(CHIP)]'
	@touch $@
