"""The section `benchmark`: what `make benchmark` passes to EleutherAI's lm-eval, by its own names.

`Benchmark` has the options that are supported; `REFUSED` says of each other one why it is not. A
test compares both with lm-eval's own functions, which this module does not import.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sft.config.section import Count, CountOrZero, Section, Seed, Share, Text, Texts

_BY_RUN = "the run and its connector give it"
_OUTPUT = "results, scores and answers are always written (docs/BENCHMARK.md)"
_RESUMES = "responses are kept and reused by themselves (docs/BENCHMARK.md)"
_SEED = "seed sets all four"
_LOGS = "results.json has what this would send"
REFUSED = {
    **dict.fromkeys(("model", "model_args", "device", "config"), _BY_RUN),
    **dict.fromkeys(("output_path", "evaluation_tracker"), _OUTPUT),
    **dict.fromkeys(
        (
            "use_cache",
            "cache_requests",
            "rewrite_requests_cache",
            "delete_requests_cache",
        ),
        _RESUMES,
    ),
    **dict.fromkeys(
        (
            "random_seed",
            "numpy_random_seed",
            "torch_random_seed",
            "fewshot_random_seed",
        ),
        _SEED,
    ),
    **dict.fromkeys(("wandb_args", "wandb_config_args", "trackio_args", "hf_hub_log_args"), _LOGS),
    **dict.fromkeys(("verbosity", "write_out", "show_config"), "predictions.jsonl has the prompts"),
    **dict.fromkeys(
        ("batch_size", "max_batch_size"),
        "chosen from free memory; --batch-size 8 is how many rows at most",
    ),
    "tasks": "give TASKS=",
    "task_manager": "give TASKS= and benchmark.include_path",
    "check_integrity": "it tests lm-eval's own tasks; run lm-eval itself",
    "predict_only": "give make infer-batch for answers without scores",
    "trust_remote_code": "code that comes with a data set is never run",
}


class Benchmark(Section):
    """How `make benchmark` runs the tasks of lm-eval, by lm-eval's own names
    (docs/BENCHMARK.md)."""

    refused: ClassVar[dict[str, str]] = REFUSED

    num_fewshot: CountOrZero | None = None
    """Solved examples before each question. null: as the task says. A task that says 0 keeps it."""
    limit: Count | Share | None = None
    """The first so many examples of each task, or this share of them. null: all."""
    samples: dict[str, list[int]] | None = None
    """Numbers of the examples to use, by task. Tasks that are not named use all. null: all."""
    include_path: Texts | Text | None = None
    """Folders with tasks of your own, which TASKS can then give by name."""
    apply_chat_template: bool | None = None
    """Ask by the chat template, as in training. null: if the run was trained on conversations."""
    fewshot_as_multiturn: bool | None = None
    """Solved examples are turns of the conversation. null: with `apply_chat_template`."""
    system_instruction: Text | None = None
    """System prompt. null: none."""
    gen_kwargs: dict[str, Any] | Text | None = None
    """Replace those of the tasks: `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_p`,
    `top_k`."""
    seed: Seed | None = None
    """Draws solved examples and sampled answers. null: lm-eval's own, 0 and 1234."""
    bootstrap_iters: CountOrZero = 1000
    """Resamples for intervals of `f1`, `mcc`, `bleu`. 0: none, and no standard errors."""
    log_samples: bool = True
    """Write prompts and answers into predictions.jsonl. false: only scores."""
    confirm_run_unsafe_code: bool = False
    """Run tasks that run code which the model has written, on this machine and as this user."""
    metadata: dict[str, Any] | None = None
    """Values for tasks that ask for some."""
    max_length: Count | None = None
    """Longest prompt with its answer, in tokens, as of lm-eval's model `hf`. null: the model's."""
