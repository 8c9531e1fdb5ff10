# make pretrain   build .venv, pre-train the embedded default under DeepSpeed ZeRO-2, export it, fill some masks
# make test       everything that needs no GPU
# make test-fast  the part of it that starts no process: for every edit
# make check      ruff, format, mypy, import-linter, pip-audit
# make docs       the documentation as a site, build/site/index.html; it opens without a server and fetches nothing
# make test-slurm a real Slurm of two nodes on this machine, through the faults a job meets; names the missing packages
# make gpu-first  all that the first minutes on an NVIDIA GPU should answer, the most important first, each stage in a
#                 process of its own: MINUTES=9, again to go on; WHEELS=folder where DeepSpeed is not installed but lies
#                 there as a wheel with what else is missing (no .venv is made; PYTHON= is taken as it is)
# make bench-gpu  the kernel benchmarks and the whole training step, 9 minutes on one NVIDIA GPU; rows into
#                 kernels/benchmarks/results, pictures into kernels/README.md; again to go on where it stopped
# make bench-cpu  the torch references of the operators on this CPU
# make bench-unpad  transformers models plain and unpadded, side by side, on a GPU or this CPU; again to go on
# make bench-host the host's time of every operator and of a layer, kernels recorded and not run; AGAINST=commit: beside those
# make test-gpu   the kernels on an NVIDIA GPU, among that a thousand runs of equal bits; make sanitize-gpu: the same at
#                 small sizes under compute-sanitizer
# make campaign-NAME   a long measurement that records its results: zero-curves, lamb-curves, muon-curves, shards, race,
#                 context, init, duplicates, cpu-speed and cpu-fine-tuning (each wants
#                 TEXT=folder of text), lamb, muon, kernels, configs, fuzz, deepspeed (the newest release instead of the
#                 pinned one), kills, storms, folders, start, checkpoint, damage (wants root, for a small disk in memory), gpu-first (its dry run),
#                 predict (wants DATA), families, unpad, slurm, modules-of-a-step, downstream (wants DATA=folder of the data sets), hf-trainer (DATA and
#                 MODEL=pre-trained folder)
# PYTHON=python3.12 make ...   chooses the interpreter of a new .venv

SHELL := /bin/bash
BIN := .venv/bin
RUN_DIR := runs/default
DEEPSPEED_CONFIG := ds_configs/zero2.json

.PHONY: pretrain test test-fast test-slurm docs check format env env-dev clean bench-gpu gpu-first
.PHONY: campaign-kills campaign-folders campaign-storms campaign-damage campaign-checkpoint campaign-downstream campaign-deepspeed campaign-hf-trainer
.PHONY: campaign-zero-curves campaign-lamb-curves campaign-muon-curves campaign-shards campaign-lamb campaign-muon campaign-kernels campaign-configs campaign-fuzz campaign-slurm
.PHONY: campaign-predict campaign-latency campaign-unpad campaign-init campaign-duplicates campaign-families campaign-gpu-first campaign-cpu-speed campaign-cpu-fine-tuning campaign-context campaign-few-shapes campaign-compile campaign-start campaign-modules-of-a-step bench-cpu bench-host bench-unpad test-gpu sanitize-gpu

env:
	@.ci/make_env.sh

env-dev:
	@.ci/make_env.sh dev

pretrain: env
	@[[ -f $(RUN_DIR)/DONE ]] || $(BIN)/python -m bert_ds.console pretrain --deepspeed_config $(DEEPSPEED_CONFIG) --run_dir $(RUN_DIR) --resume auto
	@[[ -f $(RUN_DIR)/DONE ]] || { echo "the run did not finish: see $(RUN_DIR)/logs"; exit 1; }
	@$(BIN)/python bert_ds/report.py --run_dir $(RUN_DIR) --require_below_unigram 1.5
	@[[ -f $(RUN_DIR)/hf/model.safetensors ]] || $(BIN)/python bert_ds/export_hf.py --run_dir $(RUN_DIR)
	@$(BIN)/python bert_ds/show_masks.py --model $(RUN_DIR)/hf

# Tests start more threads than there are cores: one that spins while it waits takes the core of another.
test test-fast test-slurm: export GOMP_SPINCOUNT ?= 1000

test: env-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15 -m "not campaign and not gpu and not slurm"

test-fast: env-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not campaign and not gpu and not slurm and not slow"

test-slurm: env-dev
	@$(BIN)/python tests/slurm_cluster.py
	$(BIN)/python -m pytest -m "slurm and not campaign" --durations 0 --durations-min 5 tests/test_slurm.py tests/test_slurm_pipeline.py

docs: env-dev
	$(BIN)/python -m properdocs build --strict -f docs/generator/properdocs.yml

check: env-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/audit.py

campaign-zero-curves campaign-lamb-curves campaign-muon-curves campaign-shards campaign-cpu-speed campaign-cpu-fine-tuning campaign-context campaign-few-shapes campaign-init campaign-duplicates: env-dev
	@[[ -n "$(TEXT)" ]] || { echo "TEXT=folder is missing: the text that the measurement is made on"; exit 2; }
	$(BIN)/python tests/$(subst -,_,$@).py --text $(TEXT) --work runs/$@

campaign-compile: env-dev
	$(BIN)/pytest -q -m campaign tests/test_compiled_layers.py

campaign-race: env-dev
	@[[ -n "$(TEXT)" ]] || { echo "TEXT=folder is missing: the text that the measurement is made on"; exit 2; }
	for phase in screen final parts; do $(BIN)/python tests/campaign_race.py $$phase --text $(TEXT) --work runs/$@ || exit 1; done

campaign-slurm: env-dev
	@$(BIN)/python tests/slurm_cluster.py
	$(BIN)/python tests/campaign_slurm.py

# Seconds from a rank's death at the start to the end of the others, in every way of starting.
campaign-start: env-dev
	@$(BIN)/python tests/slurm_cluster.py
	$(BIN)/python tests/campaign_start.py
	$(BIN)/python tests/campaign_start_seconds.py --work runs/start_seconds

campaign-deepspeed: env-dev
	$(BIN)/python tests/campaign_deepspeed.py

# The oldest transformers that is supported lies in a folder of its own, before the installed one.
campaign-unpad: env-dev
	@[[ -f runs/transformers-oldest/installed ]] || { $(BIN)/python -m pip --disable-pip-version-check install --quiet \
	  --target runs/transformers-oldest transformers==5.3.0 && touch runs/transformers-oldest/installed; }
	PYTHONPATH=kernels $(BIN)/python tests/campaign_unpad.py
	PYTHONPATH=$(CURDIR)/runs/transformers-oldest:kernels $(BIN)/python tests/campaign_unpad.py
	$(BIN)/python -m pytest -m "" tests/test_unpad*.py

# TRITON=3.7.1 takes that triton instead of the installed one.
campaign-kernels: env-dev
	[[ -z "$(TRITON)" ]] || $(BIN)/python -m pip install --quiet --target runs/triton-$(TRITON) --no-deps triton==$(TRITON)
	PYTHONPATH=$(if $(TRITON),$(CURDIR)/runs/triton-$(TRITON)) $(BIN)/python tests/campaign_kernels.py

campaign-configs: env-dev
	$(BIN)/python tests/campaign_configs.py

campaign-fuzz: env-dev
	$(BIN)/python tests/campaign_fuzz.py
	$(BIN)/python tests/campaign_odd_inputs.py

campaign-downstream: env-dev
	@[[ -n "$(DATA)" ]] || { echo "DATA=folder is missing: wikipedia_en, wikipedia_zh and the folders the shipped tasks name"; exit 2; }
	$(BIN)/python tests/campaign_downstream.py --data $(DATA) --work runs/$@ --jobs 2

campaign-hf-trainer: env-dev
	@[[ -n "$(DATA)" && -n "$(MODEL)" ]] || { echo "DATA=folder of the data sets and MODEL=pre-trained Hugging Face folder are wanted"; exit 2; }
	$(BIN)/python -c "import accelerate" || { echo "the Trainer wants accelerate: $(BIN)/pip install --no-deps accelerate"; exit 2; }
	$(BIN)/python tests/campaign_hf_trainer.py --data $(DATA) --model $(MODEL) --work runs/$@

campaign-predict: env-dev
	@[[ -n "$(DATA)" ]] || { echo "DATA=folder is missing: the folder that holds sst2"; exit 2; }
	$(BIN)/python tests/campaign_predict.py --data $(DATA) --work runs/$@

campaign-latency: env-dev
	$(BIN)/python -m pytest -m campaign tests/test_int8.py
	$(BIN)/python tests/campaign_latency.py --work runs/$@

campaign-lamb: env-dev
	$(BIN)/python -m pytest -m campaign tests/test_lamb_campaign.py
	$(BIN)/python tests/campaign_lamb.py errors
	$(BIN)/python tests/campaign_lamb.py times
	$(BIN)/python tests/campaign_lamb.py table

campaign-muon: env-dev
	$(BIN)/python -m pytest -m campaign tests/test_muon_zero.py
	$(BIN)/python tests/campaign_muon.py errors
	$(BIN)/python tests/campaign_muon.py times
	$(BIN)/python tests/campaign_muon.py messages
	$(BIN)/python tests/campaign_muon.py table

campaign-kills: env-dev
	$(BIN)/python tests/campaign_kills.py kills
	$(BIN)/python tests/campaign_kills.py soak
	$(BIN)/python tests/campaign_conversion.py
	$(BIN)/python tests/campaign_kills.py table

campaign-storms: env-dev
	$(BIN)/python tests/campaign_storms.py storms
	$(BIN)/python tests/campaign_storms.py table

campaign-damage: env-dev
	$(BIN)/python tests/campaign_damage.py
	$(BIN)/python tests/campaign_disk.py

campaign-folders: env-dev
	$(BIN)/python tests/campaign_folders.py

# transformers 4.57 lives in an environment of its own; torch is asked for together with it, or another build comes along.
campaign-families: env-dev
	@[[ -f .venv-transformers4/installed ]] || { $(BIN)/python -m venv .venv-transformers4 && \
	  .venv-transformers4/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 "transformers==4.57.*" && \
	  touch .venv-transformers4/installed; }
	$(BIN)/python tests/campaign_families.py --peer .venv-transformers4/bin/python --work runs/$@
	$(BIN)/python tests/campaign_family_stages.py --work runs/$@-stages
	$(BIN)/python -m pytest -m campaign tests/test_family_runs.py tests/test_family_use.py tests/test_family_kinds.py

campaign-modules-of-a-step: env-dev
	$(BIN)/python tests/campaign_modules_of_a_step.py

campaign-checkpoint: env-dev
	$(BIN)/python tests/campaign_checkpoint.py

gpu-first: $(if $(WHEELS),,env-dev)
	$(if $(WHEELS),$(or $(PYTHON),python3),$(BIN)/python) kernels/benchmarks/gpu_first.py --minutes $(or $(MINUTES),9) $(if $(WHEELS),--wheels $(WHEELS))

# Every stage of gpu-first at tiny size on a CPU; nothing is recorded.
campaign-gpu-first: env-dev
	$(BIN)/python -m pytest -s -m campaign tests/test_gpu_first.py

bench-gpu: env-dev
	$(BIN)/python kernels/benchmarks/bench_gpu.py --minutes 9
	$(BIN)/python kernels/benchmarks/plot_results.py

bench-cpu: env-dev
	$(BIN)/python kernels/benchmarks/bench_ops.py --on_cpu --minutes 9

bench-unpad: env-dev
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/bench_unpad.py

bench-host: env-dev
	$(BIN)/python kernels/benchmarks/bench_host_time.py $(if $(AGAINST),--against $(AGAINST))

test-gpu: env-dev
	$(BIN)/python -m pytest -m "not campaign" tests/test_kernel*.py tests/test_unpad_kernels.py

# Races, accesses out of bounds and barriers that not all threads reach; compute-sanitizer comes with the CUDA toolkit.
sanitize-gpu: env-dev
	for tool in memcheck racecheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	  $(BIN)/python -m pytest -m "not gpu" tests/test_kernels_on_gpu.py || exit 1; \
	done

format: env-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache
