# `make demo` and `make test` do all their own set-up: they need Python >= 3.10, make and gcc, and a package index.

PYTHON ?= python3
BIN := .venv/bin
# FFCV is built on the spot and needs OpenCV's headers: its tests run where they are.
TEST_EXTRAS := test$(shell pkg-config --exists opencv4 libturbojpeg 2>/dev/null && echo ,ffcv)

TOOLS := .venv-tools/bin
ADVISORIES := https://api.osv.dev/v1

.PHONY: demo test gpu-rehearsal lint docs dist bench docker-check sbom audit install install-test install-tools clean

demo: install
	$(BIN)/fastresnet prepare --data shapes10 --root runs/demo/data --train-images 10000 --test-images 2000
	$(BIN)/fastresnet train smoke --data shapes10 --root runs/demo/data --epochs 3 --out runs/demo/run --resume
	@ls -l runs/demo/run

# Threads and compiling processes of their own would only stand in the way of two workers on two cores. Tests of two
# threads wait for a core asleep, not spinning: less than half of their processor time.
test: install-test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TORCHINDUCTOR_COMPILE_THREADS=1 \
		$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

# CUDA code without a GPU: compiles for a simulated one. Needs g++.
gpu-rehearsal: install-test
	tests/fake_gpu/run.sh $(BIN)/python -m pytest tests/fake_gpu/rehearsal.py

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml

# The documents as a site, in site/; docs/pages.py refuses pages that read otherwise there than in the repository.
docs: install-tools
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/mkdocs build --strict

# The files of a release, in dist/; tests/test_distribution.py checks what is in them.
dist: install-tools
	rm -rf dist
	$(TOOLS)/python -m build
	$(TOOLS)/twine check --strict dist/*

bench: install
	$(BIN)/fastresnet bench loaders --data shapes10

# The image without a Docker engine: as root, with debootstrap and buildah; ten minutes and 40 GB.
docker-check:
	tests/docker_check.sh

# A list of all that is installed, in CycloneDX's format.
sbom: install install-tools
	$(TOOLS)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file sbom.json .venv
	@echo "sbom.json lists `grep -c '"bom-ref"' sbom.json` components."

# Known vulnerabilities of all that is installed. pip-audit's other source of advisories, PyPI, would let packages pass
# that it does not know, or all of them behind a mirror without advisories.
audit: install install-tools
	@$(BIN)/python -c 'import urllib.request; urllib.request.urlopen("$(ADVISORIES)/vulns/PYSEC-2022-43145", timeout=30)' \
		2>/dev/null || { echo "make audit: nothing was audited: cannot read advisories from $(ADVISORIES)." >&2; exit 1; }
	$(TOOLS)/pip-audit --vulnerability-service osv --progress-spinner off --path .venv/lib/python3.*/site-packages

install: .venv/.installed
install-test: .venv/.installed-$(TEST_EXTRAS)
install-tools: .venv-tools/.installed

.venv/.installed: pyproject.toml
	@echo "Setting up .venv: about 5 GB with PyTorch and its CUDA libraries, once."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.installed-$(TEST_EXTRAS): .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[$(TEST_EXTRAS)]'
	@touch $@

.venv-tools/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-tools
	$(TOOLS)/python -m pip install --quiet --upgrade pip
	$(TOOLS)/python -m pip install --quiet --group tools
	@touch $@

clean:
	rm -rf .venv .venv-tools runs/demo dist site sbom.json
