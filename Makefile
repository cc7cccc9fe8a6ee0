# The developer's menu. `make serve` and `make test` do all the set-up on a fresh machine.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.10 python3,$(if $(shell command -v $(p)),$(p))))
VENV   := .venv
BIN    := $(VENV)/bin
PORT   ?= 8000
HOST   ?= 127.0.0.1

# Which torch: empty takes PyPI's own build (CUDA on Linux); TORCH_BACKEND=cpu takes the small CPU build, =auto looks.
TORCH_BACKEND ?=
UV      = $(BIN)/uv pip install --quiet --python $(BIN)/python $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))

# uv does not read pip's configuration: hand over local wheel folders that pip is told about.
empty :=
comma := ,
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))))
export MSHUB_HOME ?= $(CURDIR)/.mshub

.PHONY: help serve openvino viewer pacs-tools demo-ohif e2e test check format table bench samples v1-venv v1-golden lock clean
help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 12) else "MSHub needs Python 3.10 to 3.12, found " + sys.version.split()[0] + ": run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8

$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/uv
	@echo "Installing MSHub into $(VENV) ..."
	$(UV) --requirements requirements.txt
	$(UV) --no-deps --editable .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(UV) --requirements requirements-dev.txt
	@touch $@

serve: $(VENV)/.installed  ## install and start the server on the sample data (STUDIES=DIR: on your own)
	$(BIN)/mshub serve $(if $(STUDIES),--studies "$(STUDIES)",--sample) --host $(HOST) --port $(PORT)

openvino: $(VENV)/.installed  ## install OpenVINO: predictions on a CPU take less time
	$(UV) --constraints requirements.txt --editable '.[openvino]'

viewer: $(VENV)/.installed  ## install OHIF for the server's /viewer/ (fetched with npm)
	PYTHONPATH=apps/mshub $(BIN)/python demo/install_viewer.py

pacs-tools:  ## install Orthanc and Chromium, where this machine is a Debian or Ubuntu
	demo/pacs-tools.sh

demo-ohif: $(VENV)/.installed pacs-tools viewer  ## a PACS with phantoms, the server and the viewer, in one command
	$(BIN)/python demo/ohif.py --port $(PORT) $(if $(DICOM),--dicom "$(DICOM)")

e2e: $(VENV)/.installed-dev pacs-tools viewer  ## the tests with a real PACS and a real browser
	E2E_TOOLS=required $(BIN)/python -m pytest $(addprefix tests/e2e/,test_real_pacs.py test_dicom_table.py test_ohif*.py test_sign_on_browser.py) $(ARGS)

test: $(VENV)/.installed-dev  ## the whole test suite
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev  ## lint, formatting, types, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python bench/model_table.py --check
	$(BIN)/python sample-data/generate.py --check

format: $(VENV)/.installed-dev  ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

table: $(VENV)/.installed  ## write the model table of README.md from the cards
	$(BIN)/python bench/model_table.py

bench: $(VENV)/.installed  ## measure MSHub beside nnU-Net: hours; writes docs/performance.md (ARGS=--quick: minutes)
	$(BIN)/python bench/speed.py --server $(ARGS)

samples: $(VENV)/.installed  ## rebuild sample-data/ (phantoms only; bench/train_starter.py trains the model)
	$(BIN)/python sample-data/generate.py

V1 := .venv-v1
$(V1)/.installed: requirements-v1.txt | $(BIN)/uv
	$(PYTHON) -m venv $(V1)
	$(subst --python $(BIN),--python $(V1)/bin,$(UV)) --requirements requirements-v1.txt
	@touch $@

v1-venv: $(V1)/.installed  ## nnU-Net v1 itself, in .venv-v1, to compare with

v1-golden: $(V1)/.installed  ## let nnU-Net v1 make what tests compare with (DATA=DIR: real images)
	$(V1)/bin/python tests/make_v1_golden.py
	$(V1)/bin/python tests/train_v1.py --data $(or $(DATA),../shared/data)

# torch's own CUDA packages are left out, so that one file serves CPU and GPU: torch brings what its build needs.
lock: $(BIN)/uv  ## resolve requirements*.in into requirements*.txt
	for name in requirements requirements-dev requirements-v1; do \
	  UV_FIND_LINKS= $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header $$name.in \
	    | grep -vE '^(nvidia-|cuda-|triton)' > requirements.tmp && mv requirements.tmp $$name.txt || exit 1; \
	done

clean:  ## remove the virtual environments; .mshub, which holds labels, stays
	rm -rf $(VENV) $(V1)
