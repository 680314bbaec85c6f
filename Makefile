# Two commands: `make demo` and `make test`. Each sets up the environment first, once.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
RUN    := runs/demo_cpu_$(shell date +%Y%m%d_%H%M%S)

# versions in constraints.txt that only the newest transformers takes
OF_NEWEST := transformers|tokenizers|huggingface_hub|hf-xet|httpcore2|httpx2|click|typer

COMPARED := eval/results/compare_wikipedia eval/results/peak_memory_published.json eval/results/ablations/evaluation_unrolled_regularized_lr_8_?.json
SCALING := eval/results/scaling eval/results/ablations/evaluation_equilibrium_?.json eval/results/ablations/evaluation_unrolled_regularized_lr_8_?.json eval/results/ablations/evaluation_untied_?.json eval/results/ablations/evaluation_unrolled_2_regularized_lr_8_?.json
DEPTH := eval/results/depth
GPU := eval/results/gpu
CELLS := eval/results/demo_cpu.json eval/results/demo_cpu_monotone.json eval/results/demo_cpu_multiscale.json eval/results/cells

.DEFAULT_GOAL := help
.PHONY: help demo report test test-oldest test-slow test-gpu lint audit clean

help:            ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)   ## train, evaluate and audit a small DEQ language model on built-in text (2 cores: under 10 minutes)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	    --num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN) \
	    scripts/train_lm.py recipes/demo_cpu.yaml training.output_dir=$(RUN)

report: $(READY) ## eval/report, ABLATIONS.md, CELLS.md and the numbers of the READMEs, from the committed results
	$(BIN)/python eval/report.py $(COMPARED) --output eval/report --title "Equilibrium and rivals on 21 million words"
	$(BIN)/python eval/report.py eval/results/ablations --notes eval/results/ablations/notes.yaml \
	    --markdown eval/results/ABLATIONS.md --title "What the equilibrium's loss depends on"
	$(BIN)/python eval/report.py $(SCALING) --output eval/report/scaling --title "Loss by size, tokens and operations"
	$(BIN)/python eval/report.py $(DEPTH) --output eval/report/depth --title "How many layers a longer training needs"
	$(BIN)/python eval/report.py $(GPU) --output eval/report/gpu --title "Eighteen million parameters on one GPU"
	$(BIN)/python eval/report.py $(CELLS) --markdown eval/results/CELLS.md --title "Three cells on the demo's text"
	$(BIN)/python scripts/fill_readme.py

test: $(READY) lint   ## the default test suite (2 cores: under 10 minutes)
	$(BIN)/python -m pytest -n 2

test-oldest:   ## the model, on the oldest supported transformers, in an environment of its own
	$(PYTHON) -m venv $(VENV)-oldest
	grep -vE '^($(OF_NEWEST))==' constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
	    -c $(VENV)-oldest/constraints.txt -e '.[dev]' "$$(grep -o 'transformers>=[0-9.]*' pyproject.toml | sed 's/>=/==/')"
	$(VENV)-oldest/bin/python -m pytest -n 2 tests/modeling tests/evaluation/test_generate_script.py

test-slow: $(READY)   ## the minutes-long tests
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)   ## on a GPU, the tests that need one (under a minute)
	$(BIN)/python -m pytest -n 0 tests/gpu

lint: $(READY)   ## style, types and layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

audit: $(READY)  ## known vulnerabilities of the dependencies, and risky code (needs the network)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[audit]'
	$(BIN)/bandit --quiet --recursive --severity-level medium deq_lm scripts eval
	@# strict: a package that the service does not answer for, as where only a mirror is reached, is no success
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt \
	    || { echo 'make audit: NOT PASSED. A package has a known vulnerability, or was not checked: see above.' >&2; exit 1; }

clean:           ## remove the environment and what runs wrote
	rm -rf $(VENV) $(VENV)-oldest runs cache
