# make run      set up, then run the five notebooks on the bundled sample (or on PROFILE=, CORPUS=, LABELLED= ...)
# make test     set up, lint, then all tests, the notebooks on the sample included
# make notebooks  run the notebooks on the sample and replace the ones here by the executed copies
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

PROFILE ?= sample
OPTIONS := CORPUS CORPUS_COLUMN MAX_DOCUMENTS LABELLED VALIDATION TEXT_COLUMN LABEL_COLUMN LABEL_MAP MINUTES THROUGH
lower = $(subst _,-,$(shell echo $(1) | tr A-Z a-z))
ARGUMENTS = --profile "$(PROFILE)" $(foreach o,$(OPTIONS),$(if $($(o)),--$(call lower,$(o)) "$($(o))")) $(foreach s,$(SET),--set "$(s)")

# A misspelt variable would silently mean the profile's own data.
KNOWN := PYTHON VENV PROFILE SET TESTS $(OPTIONS)
GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v))
UNKNOWN := $(filter-out $(KNOWN),$(GIVEN))
$(if $(UNKNOWN),$(error no such variable: $(UNKNOWN). There are $(KNOWN)))

.PHONY: setup run test lint format notebooks
setup: $(READY)

$(READY): requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV) (some minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch --constraint constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt --constraint constraints.txt
	@touch $(READY)

run: $(READY)
	@$(BIN)/python -m src.pipeline run $(ARGUMENTS)

test: $(READY) lint
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(TESTS)

NOTEBOOKS := --line-length 116 *.ipynb

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff check $(NOTEBOOKS)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff format --check $(NOTEBOOKS)

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff check --fix $(NOTEBOOKS)
	@$(BIN)/ruff format .
	@$(BIN)/ruff format $(NOTEBOOKS)

notebooks: $(READY)
	@$(BIN)/python -m src.pipeline run --profile sample --force --in-place
