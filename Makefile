# make demo: phantoms -> shards -> pretraining -> probe -> export -> demo/report.html
# make test: lint and tests.  make accept-spine, accept-preprocessing, accept-learning, accept-evaluation,
# accept-scale: the acceptance runs at full size.
# Each makes .venv and installs what it needs; a second run starts at once.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
DEMO ?= demo
PATIENTS ?= 40
TORCH := $(shell grep -s '^torch==' requirements-dev.txt)

.PHONY: demo test test-fast accept-spine accept-preprocessing accept-learning accept-evaluation accept-scale clean

$(VENV)/runtime.stamp: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

# torch first and alone: other packages must find it installed, or they pull another build of it
$(VENV)/dev.stamp: $(VENV)/runtime.stamp requirements-dev.txt
	$(PY) -m pip install --quiet '$(TORCH)'
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/runtime.stamp
	rm -rf $(DEMO)
	$(PY) -m data_prep phantom --output $(DEMO)/dicom --patients $(PATIENTS) --seed 0 --workers 2
	$(PY) -m data_prep build --source folder --input $(DEMO)/dicom --output $(DEMO)/data --long-side 384 \
	  --split 0.6,0.1,0.3 --key $(DEMO)/key --workers 2
	$(PY) main.py --config=configs/nano.py:$(DEMO)/data --workdir=$(DEMO)/run
	$(PY) -m mammodino_jax.export --workdir $(DEMO)/run --format hf --output $(DEMO)/encoder
	$(PY) -m mammodino_jax.evaluate --encoder $(DEMO)/run --data $(DEMO)/data --benchmark phantom --shortcuts \
	  --dense --cache $(DEMO)/cache --output $(DEMO)/results
	$(PY) -m mammodino_jax.report --workdir $(DEMO)/run --data $(DEMO)/data --results $(DEMO)/results \
	  --export $(DEMO)/encoder --output $(DEMO)/report.html

test: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest

test-fast: $(VENV)/dev.stamp
	$(PY) -m pytest -m 'not slow and not accept'

accept-spine: $(VENV)/dev.stamp
	$(PY) -m pytest -s -m accept tests/acceptance/test_spine.py

accept-preprocessing: $(VENV)/dev.stamp
	$(PY) -m pytest -s -m accept tests/acceptance/test_preprocessing.py

accept-learning: $(VENV)/dev.stamp
	$(PY) -m pytest -s -m accept tests/acceptance/test_learning*.py

accept-evaluation: $(VENV)/dev.stamp
	$(PY) -m pytest -s -m accept tests/acceptance/test_evaluation*.py

# libtpu compiles for TPUs on any machine; it is under Google's terms, so no other target installs it
$(VENV)/tpu.stamp: $(VENV)/dev.stamp
	$(PY) -m pip install --quiet 'jax[tpu]'
	touch $@

accept-scale: $(VENV)/tpu.stamp
	$(PY) -m pytest -s -m accept tests/acceptance/test_scale*.py

clean:
	rm -rf $(VENV) $(DEMO)
