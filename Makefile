# make demo | test | test-postgresql | lint | train-demo | bench | guard | clean. All need only
# python3 (3.11 or newer), pip and make; test-postgresql also needs PostgreSQL.
PYTHON ?= python3
# Another torch than that of the constraints, in an environment of its own: make test TORCH=2.12.1
TORCH ?=
VENV := .venv$(TORCH:%=-%)
BIN := $(VENV)/bin
DEMO := demo
TRAIN := train-demo
COMPUTE := fp32
EXPORT := --dtype bf16 --max-shard-size 15MB --prompt-template "{}" --default-negative-prompt ""
PROMPT := A large red star moves to the right over a green meadow.

.PHONY: demo train-demo test test-postgresql lint bench guard clean

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH),torch==$(TORCH),-c constraints.txt) -e '.[dev]'
	touch $@

# A video of a prompt of yours by the built-in model, and a sheet of frames of all such videos so far. The command
# says which files it wrote; nothing is overwritten.
demo: $(BIN)/.installed
	$(BIN)/osp generate "$(PROMPT)" --out $(DEMO)/video.mp4
	$(BIN)/osp data sheet $(DEMO)/*.mp4 --out $(DEMO)/sheet.png
	@echo "Look at the two files above. Another video: make demo PROMPT='...'"

# Everything that makes the built-in model, in some hours on two CPU cores; stop it whenever you like, the same
# command goes on. With instructions for it (avx512_bf16, amx_bf16) or a GPU: make train-demo COMPUTE=bf16.
train-demo: $(BIN)/.installed
	$(BIN)/python examples/render_clips.py $(TRAIN)/clips --count 3200
	$(BIN)/python examples/render_clips.py $(TRAIN)/held_out --held-out --count 24 --seed 1
	$(BIN)/python examples/builtin_text.py $(TRAIN)/text
	$(BIN)/osp train-vae examples/builtin/vae.toml --set model.compute=$(COMPUTE) --resume latest
	$(BIN)/python examples/render_clips.py $(TRAIN)/clips --count 8000
	$(BIN)/osp cache examples/builtin/denoiser.toml
	$(BIN)/osp train examples/builtin/denoiser.toml --set model.compute=$(COMPUTE) --resume latest
	test -e $(TRAIN)/text-to-video || $(BIN)/osp export $(TRAIN)/denoiser --out $(TRAIN)/text-to-video $(EXPORT)
	$(BIN)/python examples/render_clips.py $(TRAIN)/slow --slow --count 800
	printf 'clips,clips/annotation.json\nslow,slow/annotation.json\n' > $(TRAIN)/clips_and_slow.txt
	$(BIN)/osp cache examples/builtin/conditions.toml
	$(BIN)/osp train examples/builtin/conditions.toml --set model.compute=$(COMPUTE) --resume latest
	$(BIN)/osp export $(TRAIN)/conditions --out $(TRAIN)/model $(EXPORT)
	@echo "The model is in $(TRAIN)/model; the package has its own in src/opensoraplan/builtin/model."

# Tiny models run fastest on one thread each; two processes share the tests, but for those that start up to four.
# Those of accelerators have processes of their own, in which torch's device for others is a card in software: it
# needs what the torch of the constraints offers to such devices.
test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/distributed --ignore tests/accelerator --ignore tests/postgresql
	$(if $(TORCH),,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/accelerator)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed

# The server with several machines' store: needs PostgreSQL (Debian: apt-get install postgresql).
test-postgresql: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/postgresql

# Speed: all benchmarks into docs/performance.md (BENCH=vae: one of them), or only whether a hot path has lost a third.
bench: $(BIN)/.installed
	$(BIN)/python benchmarks/table.py $(BENCH)

guard: $(BIN)/.installed
	$(BIN)/python benchmarks/guard.py

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

# What was installed and built; videos in $(DEMO) stay.
clean:
	rm -rf .venv .venv-* build src/*.egg-info
