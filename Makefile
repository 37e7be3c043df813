# The commands of the README. Needs Python 3.11 or newer with venv, and make.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin

.PHONY: demo test bench clean
.DELETE_ON_ERROR:

demo: .venv/.installed demo/data/test.json
	$(BIN)/mars run configs/demo.yaml

demo/data/test.json: scripts/make_demo_data.py scripts/easy_vqa_data.py | .venv/.installed
	$(BIN)/python scripts/make_demo_data.py --out demo/data

test: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest

# Short forms: they show that the benchmarks run, and measure little. The full ones: see docs/performance.md.
bench: .venv/.installed-test demo/data/test.json
	@for name in speed.probe_grid speed.step_beside_peft speed.compiles speed.lanes_together speed.search_beside_grid memory.lanes_beside_processes speed.useful_steps compat.kills; do \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name --short --anyway || exit 1; \
	done

.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "mars_jax: no Python found. Install Python 3.11 (Debian: apt-get install python3 python3-venv)."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mars_jax: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed. Use: make PYTHON=/path/to/python3.11 ..."; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "mars_jax: $(PYTHON) lacks venv. Install it (Debian: apt-get install python3-venv)."; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf .venv runs demo/data
