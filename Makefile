.PHONY: help test lint format ci

help:
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make format  rewrite with ruff"
	@echo "make ci      what continuous integration runs"

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

ci:
	bash .ci/run
