# `make help` explains. Everything but the lint environment runs inside the tools tree (image/builder/host.py).

export PYTHONDONTWRITEBYTECODE := 1

BUILDER := python3 -m image.builder
TOOLS   := $(BUILDER) tools
# Tests start hundreds of Pythons; one that compiles all it imports is slow. Beside the sources no byte code may lie.
CACHED  := env -u PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX=$(CURDIR)/build/pycache
RUFF    := build/venv/bin/ruff
GUESTS  := build/test/guests/linux.raw

.PHONY: help image run test test-all test-unit test-host lint bench faults conformance release clean

help: ## explain the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14
	@echo
	@echo 'MIRROR=URL  a Debian mirror in place of the one this machine uses'
	@echo 'KEYS=DIR    a key set in place of the development keys in build/keys'
	@echo 'T=PATTERN   for test-unit and test-host: only tests whose name matches (pytest -k)'

image: ## build build/image/holdfast.raw (about three minutes the first time, half a minute later)
	@$(BUILDER) image

$(GUESTS): image tests/guest/*
	@$(TOOLS) python3 -m tests.guest build/test/guests

run: image $(GUESTS) ## boot the image in QEMU and try it with the command line tool; FRESH=1 installs it anew
	@trap '' INT; $(TOOLS) python3 -m tests.run

test: test-unit test-host ## tests without an image, then on the booted one; about 35 minutes

test-all: test-unit ## the same with those that take long: all attacks, more restarts; before a release
	@$(MAKE) --no-print-directory test-host LONG=1

test-unit: ## tests that need no image
	@$(TOOLS) $(CACHED) python3 -m pytest tests/unit -q -n 4 $(if $(T),-k '$(T)')

test-host: image $(GUESTS) ## tests on the booted image; the first one makes the checkpoint
	@$(TOOLS) python3 -m pytest tests/host -q --durations=10 $(if $(T),-k '$(T)',$(if $(LONG),,-m 'not long'))

lint: $(RUFF) ## ruff and mypy --strict
	@$(RUFF) check .
	@$(TOOLS) python3 -m mypy

# Debian has no ruff; the version is pinned because each one finds something new.
$(RUFF):
	@python3 -m venv build/venv && build/venv/bin/pip install --quiet ruff==0.17.6

bench: image $(GUESTS) ## measure, against a stock image of the same packages in the same run
	@$(TOOLS) python3 -m tests.bench

faults: image $(GUESTS) ## cut the power on the way to a new release, many times; F="--cuts 200 --starts 20"
	@$(TOOLS) python3 -m tests.faults $(F)

conformance: ## join the last test results with the requirements
	@$(TOOLS) python3 -m tests.conformance

release: ## build with release keys: make release VERSION=1.2.3 KEYS=folder
	@RELEASE=1 $(BUILDER) image

clean: ## delete everything that was built, but not the keys
	@$(BUILDER) clean
