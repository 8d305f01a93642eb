"""Numbers that are not finite and memory that runs out in the middle of a step, on any rank; with
two processes also a disk that is full for a while."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import tiny
import torch
from conftest import PATHS, representatives, run

from sft import errors
from sft.data import batches, template
from sft.train import recovery

pytestmark = pytest.mark.slow

BUDGET = batches.Budget(60, "padded")
GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def make(folder, rows=None, **train):
    rows = rows or tiny.examples(0, 11)
    settings = tiny.config(folder, **({"global_batch": 6, "max_steps": 8} | train))
    made = tiny.make_engine(tiny.llama(attention_dropout=0.3), rows, rows, settings, BUDGET)
    made.log = tiny.Said()
    return made


def steps(built, number):
    values = []
    for _ in range(number):
        values.append(built.optimizer_step())
        built.step += 1
    return values


def losses(built, number):
    return [values["train/loss"].hex() for values in steps(built, number)]


def weights(built):
    return torch.cat([p.detach().double().flatten() for p in built.task.model.parameters()])


def spoil(built, *bad_steps):
    real = built.task.loss

    def loss(model, batch):
        value, extras = real(model, batch)
        return (value * math.nan if built.step in bad_steps else value), extras

    built.task.loss = loss


def starve(built, most, error=GPU_FULL, *, backward=False):
    """Memory for micro-batches of so many tokens only."""
    real = built.task.loss

    def fail(*_):
        raise error

    def loss(model, batch):
        bad = batch.input_ids.numel() > most
        if bad and not backward:
            fail()
        value, extras = real(model, batch)
        if bad:
            value.register_hook(fail)
        return value, extras

    built.task.loss = loss


# --- numbers -----------------------------------------------------------------------------------


def test_a_skipped_step_counts_and_leaves_nothing_behind(tmp_path):
    """It is the run in which the step was left out, also in the moments of the optimizer."""
    built, left_out = make(tmp_path / "a", skip_nonfinite=2), make(tmp_path / "b")
    spoil(built, 2, 4)
    values = steps(built, 6)
    assert [v["train/skipped_steps"] for v in values] == [0, 0, 1, 1, 2, 2]
    assert [math.isnan(v["train/loss"]) for v in values] == [i in (2, 4) for i in range(6)]
    expected = []
    for step in (0, 1, 3, 5):
        left_out.step = step
        expected.append(left_out.optimizer_step()["train/loss"])
    assert [v["train/loss"] for v in values if math.isfinite(v["train/loss"])] == expected
    assert torch.equal(weights(built), weights(left_out))
    (first, second) = built.log.lines
    assert re.fullmatch(
        r"loss is nan in step 3: skipped \(1 of 2\)\. Examples: (tiny:\d+, )*tiny:\d+", first
    )
    assert "step 5: skipped (2 of 2)" in second


def test_an_infinite_gradient_is_skipped_as_well(tmp_path):
    built = make(tmp_path, skip_nonfinite=1)
    parameter = next(built.task.model.parameters())
    handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    before = weights(built)
    assert built.optimizer_step()["train/skipped_steps"] == 1
    assert torch.equal(weights(built), before)
    handle.remove()
    built.step += 1
    assert math.isfinite(built.optimizer_step()["train/grad_norm"])


def test_skipped_steps_are_counted_across_a_resume_which_stays_exact(tmp_path):
    """Adam has then seen fewer updates than the run has steps."""
    whole = make(tmp_path / "whole", skip_nonfinite=1)
    spoil(whole, 1)
    expected = losses(whole, 6)
    first = make(tmp_path / "parts", skip_nonfinite=1)
    spoil(first, 1)
    found = losses(first, 3)
    folder = first.save()
    second = make(tmp_path / "parts", skip_nonfinite=1)
    second.resume(folder)
    assert found + losses(second, 3) == expected
    assert torch.equal(weights(whole), weights(second))
    spoil(second, 6)
    with pytest.raises(errors.NonFiniteError, match=r"step 7; .* Skipped before it: 1"):
        second.optimizer_step()
    assert torch.equal(weights(whole), weights(second))


def test_by_default_the_first_one_stops_the_run_without_a_checkpoint_of_that_step(tmp_path):
    built = make(tmp_path, save_steps=1)
    spoil(built, 2)
    with pytest.raises(errors.NonFiniteError) as error:
        built.run()
    assert error.value.exit_code == 5
    assert max(int(path.name.split("_")[-1]) for path in tmp_path.glob("checkpoint_*")) == 2


def test_a_batch_without_supervised_tokens_is_a_step_of_gradient_zero(tmp_path):
    nothing = [template.Example(ids=[3, 4, 5], labels=[template.IGNORED] * 3) for _ in range(2)]
    built = make(tmp_path, nothing, global_batch=2, max_grad_norm=1.0, skip_nonfinite=1)
    before = weights(built)
    (values,) = steps(built, 1)
    assert values["train/loss"] == values["train/grad_norm"] == values["train/skipped_steps"] == 0
    assert values["train/supervised_tokens"] == 0
    assert torch.equal(weights(built), before)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    representatives(
        [
            GPU_FULL,
            MemoryError(),
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
            ),
            RuntimeError("CUDA error: out of memory"),
        ],
        2,
    ),
)
@pytest.mark.parametrize("backward", [False, True])
def test_where_memory_runs_out_the_same_global_batch_is_done_in_smaller_pieces(
    tmp_path, error, backward
):
    rich, built = make(tmp_path / "rich"), make(tmp_path / "built")
    built.task.model.config.attention_dropout = 0.0
    expected, found = steps(rich, 1), steps(built, 1)
    for layer in [*rich.task.model.model.layers, *built.task.model.model.layers]:
        layer.self_attn.attention_dropout = 0.0  # another cut has other dropout
    starve(built, 40, error, backward=backward)
    expected, found = expected + steps(rich, 3), found + steps(built, 3)
    for key in ("train/loss", "train/supervised_tokens", "train/grad_norm"):
        assert [v[key] for v in found] == pytest.approx([v[key] for v in expected], rel=1e-5)
    assert torch.allclose(weights(built), weights(rich), atol=1e-6)
    assert built.task.budget.max_tokens < 40
    logged = [line for line in built.log.lines if "memory ran out" in line]
    recorded = [event for event in built.log.events if event["event"] == "cut"]
    assert (recorded[-1]["tokens"], recorded[0]["after_step"]) == (str(built.task.budget), 1)
    assert len(recorded) == len(logged)
    assert f"train.max_tokens is {built.task.budget.max_tokens} from here on" in logged[-1]


def test_at_one_example_the_run_ends_with_its_length_and_row(tmp_path):
    built = make(tmp_path)
    before = weights(built)
    starve(built, 20)
    with pytest.raises(errors.OutOfMemory, match=r"one example of (\d+) tokens \(tiny:") as error:
        built.optimizer_step()
    assert error.value.exit_code == 6
    assert str(error.value).endswith("; `make plan` shows changes that save memory")
    assert "data." not in str(error.value)  # the engine does not know whose keys there are
    length, row = map(int, re.search(r"of (\d+) tokens \(tiny:(\d+)\)", str(error.value)).groups())
    assert built.task.lengths[row - 1] == length > 20
    assert torch.equal(weights(built), before)
    assert all(p.grad is None for p in built.task.model.parameters())


def test_in_the_update_memory_ends_the_run(tmp_path, monkeypatch):
    """Some weights may be new by then, so the step cannot be repeated."""
    built = make(tmp_path)

    def fail():
        raise GPU_FULL

    monkeypatch.setattr(built.parallel, "update", fail)
    with pytest.raises(errors.OutOfMemory, match="in a part of step 1 that cannot be repeated"):
        built.optimizer_step()


def test_where_weights_are_gathered_only_what_is_behind_the_forward_pass_is_done_again(tmp_path):
    """FSDP2 and ZeRO-3: in a forward pass other ranks wait for this one."""
    built = make(tmp_path)
    built.parallel.waits_in = "forward"
    starve(built, 40)
    with pytest.raises(errors.OutOfMemory, match=r"rank 0: .* cannot be repeated"):
        steps(built, 4)
    built = make(tmp_path)
    built.parallel.waits_in = "forward"
    real = built.task.loss

    def loss(model, batch):
        result = real(model, batch)
        if batch.input_ids.numel() > 40:
            raise GPU_FULL
        return result

    built.task.loss = loss
    steps(built, 4)
    assert built.task.budget.max_tokens < 40


def test_another_error_is_not_taken_for_a_lack_of_memory(tmp_path):
    built = make(tmp_path)
    starve(built, 1, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        built.optimizer_step()


def test_a_smaller_budget_is_half_of_what_was_held():
    lengths = [10, 10, 10, 10, 30]
    budget = batches.Budget(4096, "padded", None, 4)
    cuts = [[[4, 0, 1, 2], [3]], [[], []]]
    assert recovery.smaller_budget(budget, cuts, lengths) == batches.Budget(60, "padded", None, 2)
    assert recovery.smaller_budget(budget, [[[0], []], [[4], [1]]], lengths) is None


LIMITED = """
import resource, sys
from pathlib import Path
import psutil, tiny, torch
from sft.data import batches
from sft.runtime.log import Log

torch.set_num_threads(1)
rows = tiny.examples(0, 64)
model = tiny.llama(vocab_size=40_000)
settings = tiny.config(Path(sys.argv[1]), global_batch=64)
made = tiny.make_engine(model, rows, rows, settings, batches.Budget(4000, "padded"))
made.task.budget = batches.Budget(100, "padded")
first = made.optimizer_step()["train/loss"]
made.task.budget = batches.Budget(4000, "padded")
made.log = Log(None)
made.log.say = print
room = psutil.Process().memory_info().vms + 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
print("loss", first, made.optimizer_step()["train/loss"], made.task.budget.max_tokens)
"""


@pytest.mark.thorough("the same error, raised where memory would run out")
@pytest.mark.slow
def test_a_real_limit_of_host_memory(tmp_path):
    """RLIMIT_AS leaves 100 MiB; the logits of all examples, and what is made of them, take 200."""
    (tmp_path / "limited.py").write_text(LIMITED)
    done = run(
        sys.executable,
        str(tmp_path / "limited.py"),
        str(tmp_path),
        PYTHONPATH=PATHS,
        OMP_NUM_THREADS="1",
    )
    assert "memory ran out" in done.stdout, done.stderr
    first, second, budget = re.search(r"loss (\S+) (\S+) (\d+)", done.stdout).groups()
    assert float(second) < float(first)
    assert int(budget) <= 2000


# --- several processes -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=representatives(["ddp", "deepspeed"]))
def ranks(request, tmp_path_factory) -> list[dict]:
    """What two processes wrote, of which the second met the faults (fault_worker.py)."""
    out = Path(tmp_path_factory.mktemp(request.param))
    small = out / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if not mounted:
        small.rmdir()  # the worker then leaves that part out
    try:
        printed = forked.launch(2, ["tests/support/fault_worker.py", str(out), request.param])
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(small)], check=True)
    found = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
    assert [result["world"] for result in found] == [2, 2], printed
    return found


@pytest.mark.slow
def test_a_number_that_is_not_finite_on_one_rank_stops_all_before_the_update(ranks):
    for result in (rank["stopped"] for rank in ranks):
        assert result["loss"]["code"] == result["gradient"]["code"] == 5
        assert re.search(r"loss is nan in step 2;.* Examples: tiny:", result["loss"]["reported"])
        assert (
            "gradient norm is inf in step 1; the step was not applied"
            in (result["gradient"]["reported"])
        )
        assert result["untouched"]
    assert ranks[0]["stopped"] == ranks[1]["stopped"]


@pytest.mark.slow
def test_all_ranks_skip_together_and_nothing_of_the_step_leaks_into_the_next(ranks):
    for result in (rank["skipped"] for rank in ranks):
        assert result["losses"][2] == "nan"
        assert [loss for loss in result["losses"] if loss != "nan"] == result["expected"]
        assert result["parts"] == result["losses"]
        assert result["equal"]
        assert result["resumed"]
        assert result["counted"] == 1
        assert result["one_more"]["code"] == 5


@pytest.mark.slow
def test_memory_that_runs_out_on_one_rank_makes_all_do_the_batch_again(ranks):
    result = ranks[0]["starved"]
    places = {"before", "behind", "later", "backward"} & set(result)
    assert len(places) >= 3
    for place in places:
        seen, other = result[place], ranks[1]["starved"][place]
        expected = [float.fromhex(loss) for loss in result["expected"]]
        assert [float.fromhex(loss) for loss in seen["losses"]] == pytest.approx(expected, rel=1e-5)
        assert seen["losses"] == other["losses"]
        assert seen["difference"] < 1e-6
        assert seen["budget"] == other["budget"]
        assert seen["budget"] < 40


@pytest.mark.slow
def test_at_one_example_all_ranks_end_with_its_length_and_row(ranks):
    for result in (rank["starved"] for rank in ranks):
        assert result["poor"]["code"] == 6
        assert re.search(r"one example of \d+ tokens \(tiny:\d+\)", result["poor"]["reported"])
        assert result["untouched"]


@pytest.mark.slow
def test_where_others_wait_the_rank_ends_and_names_the_cause(ranks):
    """And they do not wait for ever: their connection is closed."""
    assert ranks[1]["stuck"]["code"] == 6
    assert "rank 1: memory ran out in a part of step 1 that" in ranks[1]["stuck"]["reported"]
    assert ranks[0].get("stuck", {"code": 1})["code"] == 1


SAVED = (0, 1, 2, 4, 5)  # steps after which a checkpoint is saved: each but the third and the last


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_all_ranks_one_checkpoint(ranks):
    if "full" not in ranks[0]:
        pytest.skip("cannot mount a file system here")
    for result in (rank["full"] for rank in ranks):
        assert result["step"] == 6
        lines = result["reported"]
        (warning,) = [line for line in lines if not line.startswith("saved ")]
        assert [line.split(":")[0] for line in lines if line != warning] == [
            f"saved checkpoint_step_{step}" for step in SAVED
        ]
        assert re.search(
            r"cannot save .*checkpoint_step_3: .*\(need \d+ KiB, have \d+ KiB", warning
        )
        assert result["left"] == ["checkpoint_step_4", "checkpoint_step_5"]
