# Each target makes .venv and installs what it needs on its first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.14.1 torchvision==0.29.1
# another index for torch alone: PyPI has wheels with CUDA only for Linux (6 GB installed), pytorch.org also smaller ones:
# make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

.PHONY: demo test test-browser test-slow test-extras tables notebooks docs lint package clean

demo: $(VENV)/.demo
	$(BIN)/fgvc train -m experiment=demo method=gap,isqrt_cov,mpn_cov,seb
	$(BIN)/fgvc make_tables results/demo
	$(BIN)/fgvc plot_spectra results/demo

# two processes of one thread each: the suite's tensors are small, and threads would wait for each other; a file's tests
# stay together, as they share trained runs
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# the report page in chromium (FGVC_CHROMIUM names another); half a minute
test-browser: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# what needs more than [dev]: pdflatex (texlive-latex-recommended); a test is skipped where its need is missing
test-extras: $(VENV)/.dev
	$(BIN)/python -m pytest -m extras -rs

# every table and figure of the documentation, from the results kept in results/ and benchmarks/results/
tables: $(VENV)/.dev
	$(BIN)/python tools/make_docs.py

# the examples, executed into build/notebooks; an error in a cell ends it
notebooks: $(VENV)/.docs
	$(BIN)/python tools/execute_notebooks.py

# the documentation as a site in site/, which opens from the disk; a broken link or anchor ends it
docs: notebooks
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 --no-warn-return-any

# sdist and wheel in dist/; the wheel is tried in an empty environment, far from this folder (three minutes)
package: $(VENV)/.dev
	$(BIN)/python tools/check_package.py $(TORCH)

# torch first and by its exact version, so that every later step finds it in place
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --extra-index-url https://pypi.org/simple)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -e '.[demo,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
