# make lab         set up and open JupyterLab on the first notebook
# make test        set up and run everything: lint, unit tests, notebooks, browser
# make train-tiny  train a small model again, or go on (MODEL=tiny-llava, tiny-nvila or
#                  tiny-internvl; OUT=folder, default runs/MODEL)
# make eval-tiny   accuracy on 1,000 scenes it has never seen, which its card then tells (MODEL as
#                  above; CHECKPOINT=folder, default data/checkpoints/MODEL, the one that ships)
# make notebooks   run every notebook, save its outputs and draw the map of the course
# make clean       remove the environment

PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= tiny-llava
OUT    ?= runs/$(MODEL)
CHECKPOINT ?= data/checkpoints/$(MODEL)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
BEFORE := tiny-internvl:tiny-llava tiny-nvila:tiny-internvl
START  := $(addprefix --start data/checkpoints/,$(patsubst $(MODEL):%,%,$(filter $(MODEL):%,$(BEFORE))))
DEPS   := pyproject.toml constraints.txt
NBVAL  := -p tests.nbval_solutions --nbval --nbval-cell-timeout=300 --nbval-sanitize-with tests/nbval_sanitize.cfg

.PHONY: lab test lint unit nbval browser train-tiny eval-tiny notebooks clean

lab: $(VENV)/.lab
	$(BIN)/jupyter lab $(LAB_ARGS) notebooks/00_start_here.ipynb

test: lint unit nbval browser

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Two workers for two cores: threads of their own would only be in each other's way.
unit nbval: export OMP_NUM_THREADS = 1
unit: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not browser" tests

nbval: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(NBVAL) notebooks

browser: $(VENV)/.test
	$(BIN)/python -m pytest -m browser tests

train-tiny: $(VENV)/.lab
	$(BIN)/python -m vlmlib.tiny.train --model $(MODEL) --out $(OUT) $(START) \
	  $(if $(wildcard $(OUT).state.pt),--resume)

eval-tiny: $(VENV)/.test
	$(BIN)/python -m vlmlib.tiny.evaluate $(CHECKPOINT)

notebooks: $(VENV)/.test
	$(BIN)/python tools/run_notebooks.py
	$(BIN)/python tools/draw_map.py

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "vlmlib needs Python 3.10 or newer; try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lab: $(DEPS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[lab]'
	touch $@

$(VENV)/.test: $(DEPS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[lab,test]'
	touch $@ $(VENV)/.lab
