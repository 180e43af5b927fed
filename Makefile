# Every target sets up what it needs in .venv first; a second time that takes under two seconds.
#   make test ARGS="-k cache -x"       ARGS go to the program that the target runs
#   make demo SETUP="--cuda 12.4"      SETUP goes to setup.sh (see ./setup.sh --help)
PYTHON := .venv/bin/python
ARGS ?=
SETUP ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo:  ## set up, then write with the model that the package ships
	@./setup.sh $(SETUP)
	@$(PYTHON) runs/demo.py $(ARGS)

test:  ## set up, then run the tests (seconds each, no GPU)
	@./setup.sh --extras test $(SETUP)
	$(PYTHON) -m pytest -m "not slow and not gpu" $(ARGS)

test-slow:  ## set up, then run the slow tests
	@./setup.sh --extras test $(SETUP)
	$(PYTHON) -m pytest -m "slow and not gpu" $(ARGS)

lint:  ## set up, then check style and formatting
	@./setup.sh --extras dev $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean:  ## remove the environment and all that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find hymba tests -name __pycache__ -prune -exec rm -rf {} +
