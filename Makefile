# The interface: one line per verb. `python -m sft VERB` does the work; `make help` is made from the comments here.
#
#   CONFIG=file.yaml       configuration (docs/CONFIG.md)      RUN=outputs/name  a finished run
#   ARGS="train.epochs=1"  overrides of its keys               JSON=file         where `plan`, `compare` write
#   NUM_PROCESSES=n        on this machine (train-*, verify-*, evaluate ...; several machines: docs/LAUNCH.md)
#   ENGINE=vllm            what answers: own (default), vllm, auto; VLLM_ARGS="--max-model-len 4096" (docs/INFER.md)
#   AGENT=0                one agent of a crowd (docs/research/CROWD.md)
#   COST_PER_HOUR=2.5      price of one GPU: `plan` prints what a run costs     LINK=50   GB/s that a GPU sends: network time
#   GIB=48                 memory of a GPU without a known name   LLAMA_CPP=path where llama.cpp is (merge: docs/MERGE.md)

PYTHON ?= python3
.DEFAULT_GOAL := help

# `make -f path/Makefile VERB` works in that folder, as `make -C path VERB` does; paths are relative to it.
ifneq ($(findstring /,$(MAKEFILE_LIST)),)
.PHONY: $(or $(MAKECMDGOALS),help)
$(or $(MAKECMDGOALS),help):
	@$(MAKE) --directory "$(patsubst %/Makefile,%,$(strip $(MAKEFILE_LIST)))" $@
else

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

# The launcher reads these from the environment, whether they come from there or are given to make.
export NUM_PROCESSES NUM_MACHINES MACHINE_RANK MASTER_ADDR MASTER_PORT ACCELERATE_CONFIG

# A variable on the command line that no target reads would be ignored: CONFIGS=my.yaml would train the default.
VARIABLES := A ACCELERATE_CONFIG ADAPTER AGENT ARGS AUTO B BASE BY COMPARE CONFIG COST_PER_HOUR DEEPSPEED DTYPE ENGINE GGUF \
	GGUF_PRE GIB GPU HOST IDS INPUT JSON KEY LICENSE LINK LLAMA_CPP LOGDIR MACHINE_RANK MASTER_ADDR MASTER_PORT MERGED METRIC MODEL \
	NUM_MACHINES NUM_PROCESSES OUTPUT OUTPUTS PORT PROMPT PYTHON RECEIPT REPO ROW RUN SEQ SHOW SIGNERS STEPS SYSTEM TASKS TB TUNE TUNING \
	UNIFORM URL VENV VENV_TOO VLLM_ARGS
$(foreach name,$(filter-out $(VARIABLES) MAKE% -%,$(.VARIABLES)),$(if $(findstring command line,$(origin $(name))),\
	$(error $(name): no target reads it; keys of the configuration go into ARGS="section.key=value". Known: $(VARIABLES))))

# The shell reads values from the environment, where none of them is a command: RUN='outputs/a`b`$$c "d"' is a name.
# ARGS is text for the shell, since it has several words.
$(foreach name,$(filter-out ARGS,$(VARIABLES)),$(if $(findstring command line,$(origin $(name))),\
	$(eval override $(name) := $$(value $(name)))$(eval export $(name))))

# $(call option,gpu,GPU) is --gpu "$GPU" where GPU has a value, else nothing.
option = $(if $(value $2),--$1 "$$$2")
flag = $(if $(value $2),--$1)
sft = $(BIN)/python -m sft $@ $(call option,config,CONFIG)
run = $(BIN)/python -m sft $@ $(call option,run,RUN)
agent = $(if $(value AGENT),"crowd.agent=$$AGENT")
part = $(if $(value AGENT),/final_checkpoint/agent$$AGENT)
model = --model "$${MODEL:-$${RUN:-outputs/nano}$(part)}" $(call option,adapter,ADAPTER)
benchmarked = $(if $(value OUTPUT)$(value AGENT),--output \
	"$${OUTPUT:-$${RUN:-outputs/nano}/evaluation/benchmark_agent$$AGENT}")
merged = $(if $(value OUTPUT)$(value AGENT),--output "$${OUTPUT:-$${RUN:-outputs/nano}/merged_agent$$AGENT}")
engine = $(call option,engine,ENGINE) $(if $(value VLLM_ARGS),"--vllm-args=$$VLLM_ARGS")
gguf = $(if $(value GGUF)$(value LLAMA_CPP),--gguf "$${GGUF:-$$LLAMA_CPP}") $(call option,gguf-pre,GGUF_PRE)

.PHONY: help setup setup-accelerate import gpu-info memory-check plan check process audit show-data \
	train train-crowd train-distributed train-fsdp train-deepspeed train-distributed-tb train-fsdp-tb train-deepspeed-tb tensorboard \
	tb-stop verify-resume verify-invariance collect-darkroom train-darkroom evaluate eval-quick eval-test benchmark compare \
	verdict classify infer infer-batch merge merge-test serve serve-test push receipt verify-receipt nano test \
	test-all test-fast test-gpu lint format docs clean

##@ Start
help: ## This list
	@if [ -t 1 ] && [ -z "$$NO_COLOR" ]; then colour=1; fi; awk -v "colour=$$colour" -f scripts/help.awk $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with the pinned requirements and this package (every target does it when needed)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
		f"error: expected Python 3.11 or newer, found {v[0]}.{v[1]}; give PYTHON=path/to/python3.11")'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "error: $(PYTHON) cannot make a virtual environment with pip. On Debian and Ubuntu:" \
		"sudo apt install python3-venv; then repeat the command" >&2; exit 1; }
	@echo "installing the pinned requirements into $(VENV) (once; 1 to 5 minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

setup-accelerate: $(READY) ## Write Accelerate's launch file and prove it [AUTO=1] [ACCELERATE_CONFIG=file]
	@$(BIN)/python -m sft $@ $(call flag,auto,AUTO) $(call option,config-file,ACCELERATE_CONFIG)

import: $(READY) ## Write an Axolotl, LLaMA-Factory or TRL configuration as one of ours [OUTPUT=file.yaml]
	@$(sft) $(call option,output,OUTPUT) $(call option,num-processes,NUM_PROCESSES)

##@ Look
gpu-info: $(READY) ## Show devices, memory, bf16 and versions
	@$(BIN)/python -m sft $@

memory-check: $(READY) ## Show how much memory and disk is used, and by what
	@$(BIN)/python -m sft $@

plan: $(READY) ## Predict memory, time and disk of a run [GPU="H100-80GB x 8"] [MODEL=config.json] [COMPARE=1]
	@$(sft) $(call option,gpu,GPU) $(call option,gib,GIB) $(call option,model,MODEL) $(call option,tuning,TUNING) \
		$(call option,seq,SEQ) $(call flag,uniform,UNIFORM) $(call flag,compare,COMPARE) $(call option,json,JSON) \
		$(call option,cost-per-hour,COST_PER_HOUR) $(call option,link,LINK) $(ARGS)

check: $(READY) ## Try everything that CONFIG needs, one training step included; nothing is written
	@$(sft) $(ARGS)

verify-resume: $(READY) ## Prove law 2 on CONFIG with a small model: killed and resumed, bit for bit [NUM_PROCESSES=2]
	@$(sft) $(call option,num-processes,NUM_PROCESSES) $(ARGS)

verify-invariance: $(READY) ## Prove law 1 on CONFIG: micro-batches, layouts, processes, engines [NUM_PROCESSES=2]
	@$(sft) $(call option,num-processes,NUM_PROCESSES) $(ARGS)

##@ Data
process: $(READY) ## Write raw files as normalised chat JSONL, with a report [OUTPUT=file.jsonl] [INPUT=path]
	@$(sft) --output "$$OUTPUT" $(if $(value INPUT),"data.train_path=$$INPUT") $(ARGS)

audit: $(READY) ## Examine every row of CONFIG as training sees it: table, audit.json, audit.html
	@$(sft) $(ARGS)

show-data: $(READY) ## Show one row's tokens in colour [ROW=17] [ROW=file:17] [IDS=1]
	@$(sft) $(call option,row,ROW) $(call flag,ids,IDS) $(ARGS)

##@ Train
train: $(READY) ## Fine-tune CONFIG in one process
	@$(sft) $(ARGS)

train-distributed: $(READY) $(if $(TB),tensorboard) ## Fine-tune on every GPU (two CPU processes without one), DDP [NUM_PROCESSES=n] [TB=1]
	@$(sft) $(ARGS)

train-fsdp: $(READY) $(if $(TB),tensorboard) ## Fine-tune with weights, gradients and optimizer sharded, FSDP2 [TB=1]
	@$(sft) $(ARGS)

train-deepspeed: $(READY) $(if $(TB),tensorboard) ## Fine-tune with DeepSpeed ZeRO-2 [DEEPSPEED=configs/deepspeed_z3.json] [TB=1]
	@$(sft) $(if $(value DEEPSPEED),"train.deepspeed_config=$$DEEPSPEED") $(ARGS)

train-distributed-tb train-fsdp-tb train-deepspeed-tb: train-%-tb: tensorboard train-%

train-crowd: $(READY) ## Train K agents on one frozen base (default: configs/crowd_nano.yaml) [NUM_PROCESSES=n]
	@$(sft) $(ARGS)

collect-darkroom: $(READY) ## Record what PPO does while it learns each goal of the Darkroom; continues where it was stopped
	@$(sft) $(ARGS)

train-darkroom: $(READY) ## Distil an algorithm: collect, train, try the unseen goals (docs/research/DISTILL.md)
	@$(sft) $(ARGS)

tensorboard: $(READY) ## Start TensorBoard on outputs/ and print its address [PORT=6006] [LOGDIR=folder]
	@$(BIN)/python -m sft $@ $(call option,port,PORT) $(call option,logdir,LOGDIR)

tb-stop: $(READY) ## Stop the TensorBoard that was started here, and no other [LOGDIR=folder]
	@$(BIN)/python -m sft $@ $(call option,logdir,LOGDIR)

##@ Use
evaluate: $(READY) ## Measure held-out loss and score the answers of a run [RUN=] [NUM_PROCESSES=2] [ENGINE=vllm]
	@$(run) $(if $(value AGENT),--name "agent$$AGENT") $(agent) $(engine) $(ARGS)

eval-quick: $(READY) ## Measure held-out loss and score the first 32 answers
	@$(run) $(if $(value AGENT),--name "quick$$AGENT") $(agent) $(engine) $(ARGS)

eval-test: $(READY) ## Measure held-out loss and score all answers, or those to another file [INPUT=file]
	@$(run) $(if $(value AGENT),--name "test$$AGENT") $(agent) $(engine) $(if $(value INPUT),"data.eval_path=$$INPUT") $(ARGS)

benchmark: $(READY) ## Score a run in standard tasks of lm-eval, or in your own [TASKS=arc_easy,my/task.yaml] [RUN=]
	@$(BIN)/python -m sft $@ $(model) --tasks "$$TASKS" $(benchmarked) $(ARGS)

compare: $(READY) ## Say whether B is better or worse than A, or not distinguishable [A=run] [B=run] [METRIC=bleu]
	@$(BIN)/python -m sft $@ --a "$$A" --b "$$B" $(call option,metric,METRIC) $(call option,show,SHOW) $(call option,json,JSON)

verdict: $(READY) ## Say what a run learnt, what it lost of its base, and what it cost [RUN=folder] [NUM_PROCESSES=2]
	@$(run) $(ARGS)

classify: $(READY) ## Ask MODEL or RUN for labels and score them; TUNE=1 also fine-tunes and compares [CONFIG=file]
	@$(sft) $(call option,model,MODEL) $(call option,run,RUN) $(call flag,tune,TUNE) $(engine) $(ARGS)

infer: $(READY) ## Talk to a run or a model [RUN= or MODEL=] [ADAPTER=] [SYSTEM=] [PROMPT="one question"]
	@$(BIN)/python -m sft $@ $(model) $(call option,system,SYSTEM) \
		$(if $(filter-out undefined,$(origin PROMPT)),--prompt "$$PROMPT") $(ARGS)

infer-batch: $(READY) ## Answer every row of INPUT into OUTPUT (JSONL) [RUN= or MODEL=] [NUM_PROCESSES=2] [ENGINE=vllm]
	@$(BIN)/python -m sft $@ $(model) --input "$$INPUT" --output "$$OUTPUT" $(engine) $(ARGS)

merge: $(READY) ## Merge RUN into its base, and prove it [OUTPUT=] [DTYPE=bf16] [BASE=] [GGUF=llama.cpp]
	@$(run) $(merged) $(agent) $(call option,dtype,DTYPE) $(call option,base,BASE) $(gguf) $(ARGS)

merge-test: $(READY) ## Prove a merged folder again [MERGED=folder] [RUN=folder] [GGUF=llama.cpp]
	@$(run) --test "$$MERGED" $(call option,base,BASE) $(gguf) $(ARGS)

receipt: $(READY) ## Write one file from which a reviewer can repeat RUN's steps [KEY=file] [BY=name]
	@$(run) $(call option,by,BY) $(call option,key,KEY) $(ARGS)

verify-receipt: $(READY) ## Check a receipt; STEPS=20-30 also trains these steps again [RECEIPT=file] [SIGNERS=file]
	@$(run) $(call option,receipt,RECEIPT) $(call option,steps,STEPS) $(call option,num-processes,NUM_PROCESSES) \
		$(call option,signers,SIGNERS) $(ARGS)

serve: $(READY) ## Serve a run or a model with OpenAI's chat protocol [RUN= or MODEL=] [PORT=8000] [ENGINE=vllm]
	@$(BIN)/python -m sft $@ $(model) $(call option,host,HOST) $(call option,port,PORT) $(engine) $(ARGS)

serve-test: $(READY) ## Prove that a server gives what was trained [URL=] [RUN=, MERGED= or GGUF=file] [MODEL=its name]
	@$(run) --url "$$URL" $(call option,merged,MERGED) $(call option,gguf,GGUF) $(call option,model,MODEL) $(ARGS)

push: $(READY) ## Upload a run or a merge to a hub, with its card [RUN= or MERGED=] [REPO=user/model] [LICENSE=]
	@$(BIN)/python -m sft $@ --folder "$${MERGED:-$${RUN:-outputs/nano}}" --repo "$$REPO" $(call option,license,LICENSE)

##@ Develop
nano: $(READY) ## Remake the embedded base model and its task from nothing (about 35 minutes)
	@$(BIN)/python -m nano.make_nano
	@$(BIN)/python -m sft train --config configs/nano_base.yaml
	@$(BIN)/python -m nano.make_nano --weights outputs/nano_base/final_checkpoint

pytest = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
test: $(READY) ## Run the tests, one or two cases of each kind (about 25 minutes on two cores)
	@$(pytest) -m "not thorough"

test-all: $(READY) ## Run all cases of all tests (about 40 minutes on two cores)
	@$(pytest)

test-fast: $(READY) ## Run those of `make test` that start no whole runs (a few minutes)
	@$(pytest) -m "not slow and not thorough"

test-gpu: $(READY) ## Run the tests that need a GPU, which the others hide
	@SFT_TEST_GPU=1 $(BIN)/python -m pytest tests/test_gpu.py

lint: $(READY) ## Run ruff check, ruff format and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY) ## Let ruff format and correct what it can
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

docs: $(READY) ## Write docs/CONFIG.md, FAULTS.md, MODELS.md and recipes/ from schema, catalogue and results
	@$(BIN)/python scripts/config_reference.py > docs/CONFIG.md
	@PYTHONPATH=.:tests:tests/support $(BIN)/python tests/faults/catalogue.py > docs/FAULTS.md
	@PYTHONPATH=.:tests:tests/support $(BIN)/python benchmarks/models.py --document > docs/MODELS.md
	@PYTHONPATH=. $(BIN)/python benchmarks/recipes.py --pages

clean: ## Remove caches; OUTPUTS=1 also removes outputs/, VENV_TOO=1 the environment
	@find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
	@rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@$(if $(OUTPUTS),rm -rf outputs,echo "kept: outputs/ (OUTPUTS=1 removes it)")
	@$(if $(VENV_TOO),rm -rf $(VENV),echo "kept: $(VENV)/ (VENV_TOO=1 removes it)")

endif
