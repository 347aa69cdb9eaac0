# Aliases only; each target is the command that README.md and CONTRIBUTING.md explain.
.PHONY: setup test faults network oldest lint demo

setup: # makes .venv with the tested versions and the developers' tools
	bash -euo pipefail -c 'source ./environment.sh; use_environment dev'

test:
	bash tests/run.sh

faults: # kills, stops and starves training processes; needs root
	bash tests/run.sh -m faults

network: # two nodes in two network namespaces; needs root
	bash tests/run.sh -m network

lint:
	ruff check .
	ruff format --check .
	pyrefly check --summarize-errors
	shellcheck -x $$(git ls-files '*.sh') .ci/run

demo:
	bash qwen3_sft.sh

oldest: # the fast tests on Python 3.12, torch 2.11, Triton 3.6 in .venv-oldest; writes their signatures
	bash tests/oldest.sh
