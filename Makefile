# The interface: one line per verb. Scripts do the work; `make help` is made from the comments here.
#
#   CONFIG=file.yaml       configuration (docs/CONFIG.md)      RUN=outputs/name  a finished run
#   ARGS="train.epochs=1"  overrides of its keys               JSON=file         where `plan`, `compare` write
#   NUM_PROCESSES=n        on this machine (train-distributed, -fsdp, -deepspeed, verify-*; several: docs/LAUNCH.md)
#   AGENT=0                one agent of a crowd (docs/research/CROWD.md)
#   GIB=48                 memory of a GPU without a known name   LLAMA_CPP=path where llama.cpp is (merge: docs/MERGE.md)

CONFIG ?= configs/nano.yaml
RUN ?= outputs/nano
DEEPSPEED ?= configs/deepspeed_z2.json
PYTHON ?= python3

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
export PYTHONPATH := $(CURDIR)
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

# scripts/train_distributed.py reads these from the environment, whether they come from there or are given to make.
export NUM_PROCESSES NUM_MACHINES MACHINE_RANK MASTER_ADDR MASTER_PORT ACCELERATE_CONFIG
launch = $(BIN)/python scripts/train_distributed.py --config $(CONFIG)
classified = $(if $(filter command environment,$(firstword $(origin CONFIG))),$(CONFIG),configs/classify_hatecheck.yaml)
crowd = $(if $(filter command environment,$(firstword $(origin CONFIG))),$(CONFIG),configs/crowd_nano.yaml)
agent = $(if $(AGENT),crowd.agent=$(AGENT))
model = --model "$(or $(MODEL),$(RUN)$(if $(AGENT),/final_checkpoint/agent$(AGENT)))" $(if $(ADAPTER),--adapter "$(ADAPTER)")
darkroom = $(if $(filter command environment,$(firstword $(origin CONFIG))),$(CONFIG),configs/ad_darkroom.yaml)
gguf = $(if $(or $(GGUF),$(LLAMA_CPP)),--gguf "$(or $(GGUF),$(LLAMA_CPP))")

.DEFAULT_GOAL := help
.PHONY: help setup setup-accelerate gpu-info memory-check plan check process audit show-data \
	train train-crowd train-distributed train-fsdp train-deepspeed train-distributed-tb train-fsdp-tb train-deepspeed-tb tensorboard \
	tb-stop verify-resume verify-invariance collect-darkroom train-darkroom evaluate eval-quick eval-test compare classify infer infer-batch merge merge-test nano test test-gpu test-fast lint format docs clean

##@ Start
help: ## This list
	@awk -f scripts/help.awk $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv and install the pinned requirements (every target does it when needed)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
		f"error: expected Python 3.11 or newer, found {v[0]}.{v[1]}; give PYTHON=path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned requirements into $(VENV) (once; 1 to 5 minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

setup-accelerate: $(READY) ## Write and verify Accelerate's file: its wizard, or AUTO=1 [ACCELERATE_CONFIG=file]
	@$(BIN)/python scripts/setup_accelerate.py $(if $(AUTO),--auto) \
		$(if $(filter command environment,$(firstword $(origin ACCELERATE_CONFIG))),--config-file $(ACCELERATE_CONFIG))

##@ Look
gpu-info: $(READY) ## Devices, memory, bf16, versions
	@$(BIN)/python scripts/gpu_info.py

memory-check: $(READY) ## Memory and disk: how much, used by what
	@$(BIN)/python scripts/memory_check.py

plan: $(READY) ## What a run takes [GPU="H100-80GB x 8"] [MODEL=config.json TUNING=qlora SEQ=4096] [COMPARE=1]
	@$(BIN)/python scripts/plan.py --config $(CONFIG) $(if $(GPU),--gpu "$(GPU)") $(if $(GIB),--gib $(GIB)) \
		$(if $(MODEL),--model "$(MODEL)") $(if $(TUNING),--tuning $(TUNING)) $(if $(SEQ),--seq $(SEQ)) \
		$(if $(UNIFORM),--uniform) $(if $(COMPARE),--compare) $(if $(JSON),--json "$(JSON)") $(ARGS)

check: $(READY) ## Try everything that CONFIG needs, one training step included; trains and writes nothing
	@$(BIN)/python scripts/check.py --config $(CONFIG) $(ARGS)

verify-resume: $(READY) ## Law 2 on CONFIG with a small model: killed and resumed, bit for bit [NUM_PROCESSES=2]
	@$(BIN)/python scripts/verify.py --law resume --config $(CONFIG) \
		$(if $(NUM_PROCESSES),--num-processes $(NUM_PROCESSES)) $(ARGS)

verify-invariance: $(READY) ## Law 1 likewise: micro-batches, layouts, processes and engines [NUM_PROCESSES=2]
	@$(BIN)/python scripts/verify.py --law invariance --config $(CONFIG) \
		$(if $(NUM_PROCESSES),--num-processes $(NUM_PROCESSES)) $(ARGS)

##@ Data
process: $(READY) ## Raw files -> normalised chat JSONL with a report OUTPUT=file.jsonl [INPUT=path]
	@$(BIN)/python scripts/process.py --config $(CONFIG) --output "$(OUTPUT)" \
		$(if $(INPUT),"data.train_path=$(INPUT)") $(ARGS)

audit: $(READY) ## Look at every row of CONFIG as training sees it: table, audit.json, audit.html
	@$(BIN)/python scripts/audit.py --config $(CONFIG) $(ARGS)

show-data: $(READY) ## One row's tokens in colour [ROW=17] or [ROW=file:17] [IDS=1]
	@$(BIN)/python scripts/show_data.py --config $(CONFIG) --row "$(or $(ROW),1)" $(if $(IDS),--ids) $(ARGS)

##@ Train
train: $(READY) ## Fine-tune CONFIG in one process (default: the embedded nano model, QLoRA)
	@$(BIN)/python scripts/train.py --config $(CONFIG) $(ARGS)

train-crowd: $(READY) ## K agents on one frozen base (default: configs/crowd_nano.yaml) [NUM_PROCESSES=n]
	@$(BIN)/python scripts/$(if $(NUM_PROCESSES),train_distributed,train).py --config $(crowd) $(ARGS)

train-distributed: $(READY) ## The same on every GPU (two CPU processes without one), DDP [NUM_PROCESSES=n]
	@$(launch) $(ARGS)

train-fsdp: $(READY) ## The same with weights, gradients and optimizer sharded, FSDP2
	@$(launch) train.engine=fsdp train.deepspeed_config=null $(ARGS)

train-deepspeed: $(READY) ## The same with DeepSpeed ZeRO-2 [DEEPSPEED=configs/deepspeed_z3.json]
	@$(launch) train.engine=deepspeed train.deepspeed_config=$(DEEPSPEED) $(ARGS)

train-distributed-tb: tensorboard train-distributed ## train-distributed with TensorBoard running

train-fsdp-tb: tensorboard train-fsdp ## train-fsdp with TensorBoard running

train-deepspeed-tb: tensorboard train-deepspeed ## train-deepspeed with TensorBoard running

collect-darkroom: $(READY) ## What PPO does while it learns each goal of the Darkroom; goes on where it was stopped
	@$(BIN)/python scripts/collect.py --config $(darkroom) $(ARGS)

train-darkroom: $(READY) ## Algorithm distillation: collect, train, try the unseen goals (docs/research/DISTILL.md)
	@$(BIN)/python scripts/train.py --config $(darkroom) $(ARGS)

tensorboard: $(READY) ## Start TensorBoard on outputs/ and print its address [PORT=6006]
	@$(BIN)/python scripts/tensorboard_server.py start --logdir outputs $(if $(PORT),--port $(PORT))

tb-stop: $(READY) ## Stop the TensorBoard that was started here, and no other
	@$(BIN)/python scripts/tensorboard_server.py stop --logdir outputs

##@ Use
evaluate: $(READY) ## Held-out loss and scored answers of a run [RUN=outputs/nano] [AGENT=0] [NUM_PROCESSES=2]
	@$(BIN)/python scripts/evaluate.py --run $(RUN) $(if $(AGENT),--name agent$(AGENT)) $(agent) $(ARGS)

eval-quick: $(READY) ## Held-out loss, and scored answers to the first 32 rows
	@$(BIN)/python scripts/evaluate.py --run $(RUN) --name quick$(AGENT) evaluation.num_examples=32 $(agent) $(ARGS)

eval-test: $(READY) ## The same for every held-out row, or those of another file [INPUT=file]
	@$(BIN)/python scripts/evaluate.py --run $(RUN) --name test$(AGENT) evaluation.num_examples=1000000000 $(agent) \
		$(if $(INPUT),"data.eval_path=$(INPUT)") $(ARGS)

compare: $(READY) ## Is B better or worse than A, or not distinguishable? A=run B=run [METRIC=rouge_l,bleu] [SHOW=5]
	@$(BIN)/python scripts/compare.py --a "$(A)" --b "$(B)" $(if $(METRIC),--metric "$(METRIC)") \
		$(if $(SHOW),--show $(SHOW)) $(if $(JSON),--json "$(JSON)")

classify: $(READY) ## Ask MODEL or RUN for labels, and score them; TUNE=1 teaches them, and compares [CONFIG=file]
	@$(BIN)/python scripts/classify.py --config $(classified) $(if $(MODEL),--model "$(MODEL)") \
		$(if $(filter command environment,$(firstword $(origin RUN))),--run "$(RUN)") $(if $(TUNE),--tune) $(ARGS)

infer: $(READY) ## Talk to a run or a model [RUN= or MODEL=] [ADAPTER=] [SYSTEM=] [PROMPT="one question"]
	@$(BIN)/python scripts/infer.py $(model) $(if $(SYSTEM),--system "$(SYSTEM)") \
		$(if $(filter command environment,$(firstword $(origin PROMPT))),--prompt "$(PROMPT)") $(ARGS)

infer-batch: $(READY) ## Answer every row of INPUT into OUTPUT (JSONL) [RUN= or MODEL=] [NUM_PROCESSES=2]
	@$(BIN)/python scripts/infer_batch.py $(model) --input "$(INPUT)" --output "$(OUTPUT)" $(ARGS)

merge: $(READY) ## Merge RUN into its base, and prove it [OUTPUT=] [DTYPE=bf16] [BASE=dequantised] [GGUF=llama.cpp]
	@$(BIN)/python scripts/merge.py --run $(RUN) $(if $(or $(OUTPUT),$(AGENT)),--output $(or $(OUTPUT),$(RUN)/merged_agent$(AGENT))) \
		$(agent) $(if $(DTYPE),--dtype $(DTYPE)) \
		$(if $(BASE),--base $(BASE)) $(gguf) $(ARGS)

merge-test: $(READY) ## The proof again, on a merged folder MERGED=folder [RUN=folder] [GGUF=llama.cpp]
	@$(BIN)/python scripts/merge.py --test "$(MERGED)" $(if $(filter command environment,$(firstword $(origin RUN))),--run $(RUN)) \
		$(if $(BASE),--base $(BASE)) $(gguf) $(ARGS)

##@ Develop
nano: $(READY) ## Remake the embedded base model and its task from nothing (about 35 minutes)
	@$(BIN)/python -m nano.make_nano
	@$(BIN)/python scripts/train.py --config configs/nano_base.yaml
	@$(BIN)/python -m nano.make_nano --weights outputs/nano_base/final_checkpoint

test: $(READY) ## All tests (about 15 minutes)
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-gpu: $(READY) ## What only a GPU shows (the other tests hide it)
	@SFT_TEST_GPU=1 $(BIN)/python -m pytest tests/test_gpu.py

test-fast: $(READY) ## The tests that take no whole runs (under 90 s)
	@$(BIN)/python -m pytest -m "not slow"

lint: $(READY) ## ruff check, ruff format, mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY) ## Let ruff format and mend what it can
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

docs: $(READY) ## Regenerate docs/CONFIG.md from the schema, docs/FAULTS.md from its catalogue
	@$(BIN)/python scripts/config_reference.py > docs/CONFIG.md
	@PYTHONPATH=.:tests:tests/support $(BIN)/python tests/faults/catalogue.py > docs/FAULTS.md

clean: ## Remove caches; OUTPUTS=1 also removes outputs/, VENV_TOO=1 the environment
	@find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
	@rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@$(if $(OUTPUTS),rm -rf outputs,echo "kept: outputs/ (OUTPUTS=1 removes it)")
	@$(if $(VENV_TOO),rm -rf $(VENV),echo "kept: $(VENV)/ (VENV_TOO=1 removes it)")
