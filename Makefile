# make demo | make test | make lint | make clean. All need only python3 (3.11 or newer), pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test lint clean

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# A small release with random weights, through the whole path: convert, generate, a rendered clip through the
# VAE.
demo: $(BIN)/.installed
	rm -rf $(DEMO)
	$(BIN)/python examples/tiny_release.py $(DEMO)/release
	$(BIN)/osp inspect $(DEMO)/release/model_ema.pt
	$(BIN)/osp convert --config $(DEMO)/release/inference.json --out $(DEMO)/model
	$(BIN)/osp generate "a red ball rolls over green grass" --model $(DEMO)/model --out $(DEMO)/ball.mp4 \
		--frames 17 --height 128 --width 192 --steps 8 --dtype fp32
	$(BIN)/osp data render $(DEMO)/shapes --count 4
	$(BIN)/osp data check $(DEMO)/shapes/data.txt \
		--set num_frames=25 min_num_frames=25 train_fps=12 max_height=96 max_width=96
	$(BIN)/osp reconstruct $(DEMO)/shapes/clips/000000.mp4 --vae $(DEMO)/model --out $(DEMO)/reconstruction.mp4
	@echo "Look at $(DEMO)/ball.mp4 and $(DEMO)/reconstruction.mp4: noise, for the weights are random."

# Tiny models run fastest on one thread each; two processes share the tests.
test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV) $(DEMO) build src/*.egg-info
