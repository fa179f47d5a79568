# make run    set up and run experiments/smoke.yaml in rootless network namespaces
# make test   set up and run the checks and all tests
# make lint   the checks alone
# make fast   the checks, and the tests that need nothing and take moments; under a minute
# make docs   the site of the documentation, in site/; make docs-serve serves it at 127.0.0.1:8000, and follows changes
# make dist   the wheel and the source archive, in dist/
# make test-delayline    the same with the delay line that stands in where the kernel has no netem
# make test-netem    the tests of delay, jitter and loss, under User-Mode Linux (package user-mode-linux)
# make test-swarm    the tests of the swarm lab, on three Docker daemons of this machine; needs root and the image
# make test-chaos    kill parts of running experiments at random moments; KILLS=200 LAB=docker for more and others
# They work on a fresh machine with Python >= 3.11; EXPERIMENT=path.yaml runs another experiment.

PYTHON ?= python3
VENV ?= .venv
EXPERIMENT ?= experiments/smoke.yaml
PYTEST_ARGS ?=

KILLS ?= 20
LAB ?= netns

# Tests of figures that labs give, and others that are about time, need the machine to themselves. Of the rest two files run at
# once.
ALONE = alone or ((docker or netns) and not shared)

.PHONY: run test lint fast docs docs-serve dist test-netem test-delayline test-swarm test-chaos check setup clean

run: setup
	$(VENV)/bin/testbed run $(EXPERIMENT)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# A file of tests belongs to these with the line: pytestmark = pytest.mark.fast
fast: lint
	$(VENV)/bin/python -m pytest -q -n 2 -m fast $$(grep -lr --include 'test_*.py' 'mark\.fast' tests) $(PYTEST_ARGS)

# A test that asks for a valid run gets it again, three times at most, where the verdict was that other programs disturbed it,
# or that its links did not carry their rate, which takes processors, too.
AGAIN = --reruns 3 --only-rerun 'was\s+too\s+busy' --only-rerun 'calibrated\s+rates\s+and\s+delays\s+are\s+off'

test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(AGAIN) -m "not netem and not swarm and not ($(ALONE))" $(PYTEST_ARGS); others=$$?; \
	$(VENV)/bin/python -m pytest $(AGAIN) -m "not netem and not swarm and ($(ALONE))" $(PYTEST_ARGS); alone=$$?; \
	case $$others,$$alone in 0,0 | 0,5 | 5,0) ;; *) exit 1 ;; esac  # 5: PYTEST_ARGS selects none of these

# Delay, jitter, loss and the like need netem, which not every kernel has; a User-Mode Linux kernel brings it along.
test-netem: setup
	$(VENV)/bin/python tests/netem/uml.py -- python -m pytest tests/netem $(PYTEST_ARGS)

# The same tests with the delay line in user space instead, on the kernel that is there.
test-delayline: setup
	NETSENSE_ENGINE=userspace NETSENSE_REQUIRE=netem \
		unshare $$([ $$(id -u) = 0 ] || echo --user --map-root-user) --net --mount --pid --fork --kill-child --mount-proc \
		$(VENV)/bin/python -m pytest tests/netem --ignore tests/netem/test_netem_aqm.py \
		--ignore tests/netem/test_limits_delegated.py $(PYTEST_ARGS)

test-swarm: setup
	NETSENSE_REQUIRE=swarm $(VENV)/bin/python -m pytest $(AGAIN) tests/swarm $(PYTEST_ARGS)

test-chaos: setup
	$(VENV)/bin/python tests/chaos/kills.py --kills $(KILLS) --lab $(LAB)

docs: setup
	$(VENV)/bin/mkdocs build --strict

docs-serve: setup
	$(VENV)/bin/mkdocs serve --dev-addr 127.0.0.1:8000

dist: setup
	$(VENV)/bin/pip install --quiet --disable-pip-version-check build twine
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation --outdir dist .
	$(VENV)/bin/twine check --strict dist/*

setup: check $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

# Every missing system package is named together with the command that installs it.
check:
	@command -v $(PYTHON) >/dev/null || { echo "Python is missing; install it with: sudo apt-get install python3 (or: sudo dnf install python3)"; exit 4; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is older; name another one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 4; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv is missing; install it with: sudo apt-get install python3-venv"; exit 4; }
	@command -v unshare >/dev/null || { echo "unshare is missing; install it with: sudo apt-get install util-linux (or: sudo dnf install util-linux)"; exit 4; }

clean:
	rm -rf $(VENV)
