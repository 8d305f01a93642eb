"""The loop: schedule, refusal of non-finite steps, exact resume. Law 1 is in test_laws.py."""

from __future__ import annotations

import io
import json
import math
import signal
import time
import zlib
from pathlib import Path
from types import SimpleNamespace as Has

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import get_inverse_sqrt_schedule

from sft import errors
from sft.data import batches, template
from sft.errors import ConfigError, Preempted
from sft.runtime import checkpoint
from sft.runtime.console import make_console
from sft.runtime.log import Log
from sft.runtime.watchdog import Guard
from sft.train import engine, loss_scale
from sft.train.optimizer import build_optimizer
from sft.train.recovery import Oom, OomGuard
from sft.train.schedule import learning_rate, total_steps

BUDGET = batches.Budget(60, "padded")
SCHEDULES = {  # warm-up of 2 of 10 steps to a peak of 1; the floor of cosine and linear is 0.1
    "constant": [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "linear": [0.5, 1, 1, 0.8714, 0.7429, 0.6143, 0.4857, 0.3571, 0.2286, 0.1],
    "cosine": [0.5, 1, 1, 0.9554, 0.8305, 0.6501, 0.4499, 0.2695, 0.1446, 0.1],
    "wsd": [0.5, 1, 1, 1, 1, 1, 0.55, 0.3636, 0.2206, 0.1],  # 1 - sqrt(1/4, 2/4, 3/4, 1)
    "cosine_with_restarts": [0.5, 1, 1, 0.8305, 0.4499, 0.1446, 0.9554, 0.6501, 0.2695, 0.1],
    "inverse_sqrt": [0.5, 1, 0.8348, 0.7364, 0.6692, 0.6196, 0.5811, 0.55, 0.5243, 0.5025],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_by_step(tmp_path, schedule):
    own = {"decay_ratio": 0.4} if schedule == "wsd" else {}
    for warmup in ({"warmup_ratio": 0.15}, {"warmup_steps": 2}):
        settings = {"schedule": schedule, "learning_rate": 1.0, "min_lr_ratio": 0.1}
        train = tiny.config(tmp_path, **settings, **own, **warmup).train
        rates = [learning_rate(train, step, 10) for step in range(10)]
        assert rates == pytest.approx(SCHEDULES[schedule], abs=1e-4)


def test_inverse_sqrt_is_the_one_of_transformers_a_step_earlier(tmp_path):
    """It begins with a rate of 0, in a step that changes nothing."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    for warmup in (0, 5):
        scheduler = get_inverse_sqrt_schedule(optimizer, warmup)
        settings = {"schedule": "inverse_sqrt", "learning_rate": 1.0, "warmup_steps": warmup}
        train = tiny.config(tmp_path, **settings).train
        for step in range(40):
            expected = scheduler.lr_lambdas[0](step + 1)
            assert learning_rate(train, step, 40) == pytest.approx(expected, rel=1e-6)


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 70),
    share=st.floats(0.01, 0.99),
    cycles=st.integers(1, 9),
)
def test_no_rate_leaves_its_bounds_and_the_first_after_the_warm_up_is_near_the_peak(
    schedule, steps, warmup, share, cycles
):
    own = {"wsd": {"decay_ratio": share}, "cosine_with_restarts": {"num_cycles": cycles}}
    settings = {"schedule": schedule, "learning_rate": 1.0, "warmup_steps": warmup}
    settings |= {"min_lr_ratio": 0.1, **own.get(schedule, {})}
    train = tiny.config(Path("run"), **settings).train
    rates = [learning_rate(train, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    if warmup and warmup <= steps:
        assert rates[warmup - 1] == 1
    if schedule in ("linear", "cosine", "wsd", "cosine_with_restarts") and warmup < steps - 1:
        assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"epochs": 1, "global_batch": 4}, 3),  # 10 examples: 4 + 4 + 2
        ({"epochs": 2.5, "global_batch": 4}, 8),
        ({"epochs": 0.01, "global_batch": 4}, 1),
        ({"epochs": 3, "max_steps": 5, "global_batch": 4}, 5),
        ({"epochs": 1, "global_batch": 100}, 1),
    ],
)
def test_number_of_steps(tmp_path, settings, expected):
    assert total_steps(tiny.config(tmp_path, **settings).train, 10) == expected


def test_weight_decay_is_for_matrices_only(tmp_path):
    optimizer = build_optimizer(
        tiny.config(tmp_path, weight_decay=0.5).train, tiny.llama(attention_bias=True)
    )
    for group in optimizer.param_groups:
        expected = 0.5 if group["params"][0].ndim >= 2 else 0.0
        assert group["weight_decay"] == expected
        assert all((p.ndim >= 2) == bool(expected) for p in group["params"])


def make(folder, rows=None, **train):
    rows = rows or tiny.examples(0, 11)
    settings = tiny.config(folder, **({"global_batch": 4, "max_steps": 8} | train))
    # bitsandbytes keeps 8-bit state of tensors with 4,096 elements and more
    model = tiny.llama(attention_dropout=0.3, intermediate_size=160)
    return tiny.make_engine(model, rows, rows, settings, BUDGET)


def weights(built):
    return {name: value.clone() for name, value in built.task.model.state_dict().items()}


def test_a_non_finite_loss_stops_before_the_update_and_names_the_rows(tmp_path):
    rows = tiny.examples(0, 8)
    built = make(tmp_path, rows, global_batch=8)
    built.task.budget = batches.Budget(1, "padded")  # every example alone
    token = rows[0].ids[0]
    with torch.no_grad():
        built.task.model.get_input_embeddings().weight[token] = float("nan")
    before = weights(built)
    with pytest.raises(errors.NonFiniteError, match="loss is nan in step 1") as error:
        built.optimizer_step()
    assert error.value.exit_code == 5
    named = {i for i in range(8) if f"tiny:{i + 1}" in str(error.value)}
    assert named == {i for i, row in enumerate(rows) if reaches_the_loss(row, token)}
    assert 0 < len(named) < 8
    for name, value in weights(built).items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name


def reaches_the_loss(row, token: int) -> bool:
    """Whether a supervised token stands behind this one."""
    first = row.ids.index(token) if token in row.ids else len(row.ids)
    return any(label != template.IGNORED for label in row.labels[first + 1 :])


def test_an_infinite_gradient_is_not_applied(tmp_path):
    built = make(tmp_path)
    before = weights(built)
    parameter = next(built.task.model.parameters())
    parameter.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    with pytest.raises(errors.NonFiniteError, match="gradient norm is"):
        built.optimizer_step()
    assert all(torch.equal(value, before[name]) for name, value in weights(built).items())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, optimizer):
    """With dropout, in the middle of an epoch, and with an evaluation in between."""
    whole = make(tmp_path / "whole", optimizer=optimizer)
    losses = []
    for _ in range(8):
        losses.append(whole.optimizer_step()["train/loss"])
        whole.step += 1
    first = make(tmp_path / "parts", optimizer=optimizer)
    for _ in range(5):
        first.optimizer_step()
        first.step += 1
    first.evaluate()
    folder = first.save()
    dtypes = {t.dtype for each in folder.glob("optimizer*") for t in load_file(each).values()}
    assert (torch.uint8 in dtypes) == optimizer.endswith("8bit")
    second = make(tmp_path / "parts", optimizer=optimizer)
    assert checkpoint.fault(folder) is None
    second.resume(folder)
    for expected in losses[5:]:
        assert second.optimizer_step()["train/loss"] == expected
        second.step += 1
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_checkpoint_of_before_optimizers_by_name_is_resumed_bit_for_bit(tmp_path, optimizer):
    """Its header has no numbers, and says of every tensor that it starts at 0."""
    whole = make(tmp_path, optimizer=optimizer)
    for _ in range(3):
        whole.optimizer_step()
        whole.step += 1
    folder = whole.save()
    (file,) = folder.glob("optimizer*")
    tensors = load_file(file)
    starts = dict.fromkeys(tensors, 0)
    save_file(tensors, file, metadata={"starts": json.dumps(starts)})
    resumed = make(tmp_path, optimizer=optimizer)
    resumed.read(folder)
    for each in (whole, resumed):
        each.optimizer_step()
    assert resumed.parallel.checksums() == whole.parallel.checksums()
    assert resumed.parallel.num_updates == 4


def test_a_checkpoint_is_the_weights_the_optimizer_and_one_number(tmp_path):
    built = make(tmp_path)
    built.optimizer_step()
    built.step += 1
    folder = built.save()
    state = json.loads((folder / "trainer.json").read_text())
    assert state["step"] == 1
    saved = load_file(folder / "model.safetensors")
    trained = dict(built.task.model.named_parameters())
    assert all(torch.equal(saved[name], trained[name]) for name in saved)
    assert {path.suffix for path in folder.rglob("*.*")} == {".json", ".safetensors"}  # no pickle


@pytest.mark.parametrize("change", [{"seed": 1}, {"global_batch": 5}, {"optimizer": "adamw_8bit"}])
def test_another_run_is_not_resumed(tmp_path, change):
    built = make(tmp_path)
    built.optimizer_step()
    built.step += 1
    folder = built.save()
    (key,) = change
    with pytest.raises(ConfigError, match=rf"train\.{key}: was .*, is") as reported:
        make(tmp_path, **change).resume(folder)
    assert reported.value.exit_code == 2


@pytest.mark.parametrize(
    ("key", "code"), [("model", 2), ("tuning", 2), ("tokenizer", 2), ("template", 2), ("data", 3)]
)
def test_a_run_on_another_base_or_other_data_is_not_resumed(tmp_path, monkeypatch, key, code):
    built = make(tmp_path)
    folder = built.save()
    other = built.task.identity() | {key: "other"}
    monkeypatch.setattr(built.task, "identity", lambda: other)
    with pytest.raises(ConfigError, match=rf"{key}: was .*, is other") as reported:
        built.resume(folder)
    assert reported.value.exit_code == code


def test_a_folder_that_says_another_step_is_refused(tmp_path):
    folder = make(tmp_path).save()
    renamed = folder.rename(tmp_path / "checkpoint_step_7")
    with pytest.raises(errors.CheckpointError, match="not what a run writes into such a folder"):
        make(tmp_path).resume(renamed)


def test_what_may_change_is_logged(tmp_path, capsys):
    folder = make(tmp_path).save()
    changed = make(tmp_path, learning_rate=5e-4, log_steps=3, max_steps=9)
    changed.log = Log(tmp_path / "run")
    changed.resume(folder)
    reported = capsys.readouterr().out
    for line in ("learning_rate was 0.001, is 0.0005", "log_steps was 10, is 3"):
        assert f"changed since: {line}" in reported
    assert "seed" not in reported


def test_a_probe_leaves_no_trace(tmp_path):
    probed, plain = make(tmp_path), make(tmp_path)
    assert probed.probe_seconds_per_step() > 0
    assert probed.optimizer_step()["train/loss"] == plain.optimizer_step()["train/loss"]
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(probed)[name])


def in_fp16(folder, scale=loss_scale.FIRST, **train):
    """An engine whose gradients overflow at any loss scale above 2 ** 20."""
    built = make(folder, precision="fp16", **train)
    built.loss_scale.value = scale
    return built


def test_a_step_that_overflows_in_fp16_is_repeated_and_loses_no_example(tmp_path, capsys):
    """It equals that of a run whose scale was small enough from the start, bit for bit."""
    high, low = in_fp16(tmp_path / "a", 2.0**30), in_fp16(tmp_path / "b")
    high.log = Log(tmp_path / "log")
    first = high.optimizer_step()
    fits = first["train/loss_scale"]
    assert first["train/overflows"] == math.log2(2.0**30 / fits) >= 5
    assert f"the step was repeated with a loss scale of {fits:,.0f}" in capsys.readouterr().out
    low.loss_scale.value = fits
    second = low.optimizer_step()
    assert second["train/overflows"] == 0
    for key in ("train/loss", "train/grad_norm", "data/examples_crc32"):
        assert first[key] == second[key], key
    assert all(torch.equal(v, weights(low)[n]) for n, v in weights(high).items())
    assert high.num_skipped == 0


def test_an_infinite_gradient_that_no_scale_mends_is_not_blamed_on_the_scale(tmp_path):
    built = in_fp16(tmp_path)
    parameter = next(built.task.model.parameters())
    parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
    with pytest.raises(errors.NonFiniteError, match="gradient norm is nan"):
        built.optimizer_step()
    assert built.loss_scale == loss_scale.LossScale()


def test_the_loss_scale_doubles_after_many_updates_and_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    whole, values = in_fp16(tmp_path / "whole", 2.0**8), []
    for _ in range(8):
        values.append(whole.optimizer_step())
        whole.step += 1
        if whole.step == 4:
            folder = whole.save()
    scales = [each["train/loss_scale"] / 2**8 for each in values]
    assert scales == [1, 1, 2, 2, 2, 4, 4, 4]
    resumed = in_fp16(tmp_path / "resumed")
    resumed.resume(folder)
    assert resumed.loss_scale == loss_scale.LossScale(2.0**9, 1, 0)
    for expected in values[4:]:
        found = resumed.optimizer_step()
        resumed.step += 1
        assert {k: v for k, v in found.items() if k.startswith("train")} == {
            k: v for k, v in expected.items() if k.startswith("train")
        }
    assert all(torch.equal(v, weights(whole)[n]) for n, v in weights(resumed).items())


@pytest.mark.parametrize("change", [{"value": 0}, {"value": "x"}, {"updates": -1}, {"value": None}])
def test_a_loss_scale_that_no_run_writes_is_not_resumed(tmp_path, change):
    built = in_fp16(tmp_path)
    built.optimizer_step()
    built.step += 1
    folder = built.save()
    state = json.loads((folder / "trainer.json").read_text())
    state["loss_scale"] |= change
    (folder / "trainer.json").write_text(json.dumps(state))
    with pytest.raises(errors.CheckpointError, match="is not what a run writes"):
        in_fp16(tmp_path).resume(folder)


def test_training_lowers_the_loss_of_what_it_sees(tmp_path):
    built = make(tmp_path, max_steps=40, learning_rate=1e-2, max_grad_norm=1.0)
    before = built.evaluate()["loss"]
    built.run()
    assert built.step == 40
    assert built.evaluate()["loss"] < 0.5 * before


class Interrupting(io.RawIOBase):
    """A file that is signalled in the middle of its first write."""

    def __init__(self):
        self.written = b""

    def writable(self):
        return True

    def write(self, data):
        if not self.written:
            signal.raise_signal(signal.SIGTERM)
        self.written += bytes(data)
        return len(data)


def test_a_signal_in_the_middle_of_a_log_line_stops_the_run_saved(tmp_path, capfd):
    built = make(tmp_path, log_steps=1)
    built.log = Log(tmp_path / "run")
    raw = Interrupting()
    built.log._file = make_console(io.TextIOWrapper(io.BufferedWriter(raw)))
    with Guard(tmp_path) as built.guard:
        built.guard.join(built.accelerator, None)
        with pytest.raises(Preempted, match="after step 2; saved"):  # step 1 was over
            built.run()
    assert "SIGTERM: stopping after this step" in capfd.readouterr().err
    reported = raw.written.decode()
    assert "step     1/8" in reported
    assert "asked to stop: saving step 2" in reported
    assert checkpoint.fault(tmp_path / "checkpoint_step_2") is None


def test_an_evaluation_that_a_signal_abandoned_is_made_up_for(tmp_path):
    def abandoned(_):
        built.guard.agree(stop=1, save=0)
        built.guard.stop_if_agreed()

    built = make(tmp_path, eval_steps=2, save_best="loss")
    built.task.evaluate = abandoned
    with pytest.raises(Preempted, match="after step 2; saved"):
        built.run()
    again, seen = make(tmp_path, eval_steps=2, save_best="loss"), []
    evaluate = again.task.evaluate

    def noted(model):
        seen.append(again.step)
        return evaluate(model)

    again.task.evaluate = noted
    again.resume(tmp_path / "checkpoint_step_2")
    again.run()
    assert seen == [2, 4, 6]
    assert again.keeper.best.step in seen


def test_a_resumed_run_does_not_save_its_step_again(tmp_path):
    built = make(tmp_path)
    built.step = 3
    folder = built.save()
    before = (folder / checkpoint.MANIFEST).stat()
    again = make(tmp_path)
    again.resume(folder)
    assert again.save() == folder
    assert (folder / checkpoint.MANIFEST).stat() == before


def test_an_evaluation_is_not_repeated_by_a_resume(tmp_path):
    settings = {"eval_steps": 2, "save_steps": 2}
    make(tmp_path, **settings).run()
    again, seen = make(tmp_path, **settings), []
    again.task.evaluate = lambda _: seen.append(again.step) or {"loss": 1.0}
    again.resume(tmp_path / "checkpoint_step_4")
    assert again.last_evaluated == 4
    again.run()
    assert seen == [6]


def test_dropout_draws_another_mask_in_every_step(tmp_path):
    """The same examples with the same weights: only the mask can make the loss differ."""
    rows = tiny.examples(0, 4)
    built = make(tmp_path, rows, shuffle=False)
    built.parallel.update = lambda: None
    losses = {}
    for step in (0, 1, 2, 1, 0):
        built.step = step
        loss = built.optimizer_step()["train/loss"]
        built.parallel.zero_grad()
        assert losses.setdefault(step, loss) == loss
    assert len(set(losses.values())) == 3


def test_the_digest_of_the_weights_changes_with_a_step(tmp_path):
    made = make(tmp_path)
    before = made.digest()
    assert made.digest() == before
    made.optimizer_step()
    assert made.digest() != before


def test_a_step_logs_what_it_was_made_of(tmp_path, monkeypatch):
    built = make(tmp_path)
    monkeypatch.setattr(engine, "memory_bytes", lambda: 3 * 2**30)
    ids = built.window(0)[0]
    started = time.perf_counter()
    values = built.optimizer_step()
    elapsed = time.perf_counter() - started
    rows = [tiny.examples(0, 11)[i] for i in ids]
    seconds, speed = values.pop("speed/step_seconds"), values.pop("speed/tokens_per_second")
    assert 0 < seconds <= elapsed
    assert speed * seconds == pytest.approx(sum(len(row.ids) for row in rows))
    assert values.pop("train/loss") > 0
    assert values.pop("train/grad_norm") > 0
    assert 0 <= values.pop("train/token_accuracy") <= 1
    assert values == {
        "train/learning_rate": built.optimizer.param_groups[0]["lr"],
        "train/tokens": sum(len(row.ids) for row in rows),
        "train/supervised_tokens": sum(row.num_supervised for row in rows),
        "data/examples_crc32": zlib.crc32(repr(ids).encode()),
        "memory/gib": 3.0,
    }


def test_an_evaluation_is_logged_at_its_step(tmp_path):
    built = make(tmp_path)
    built.log = Log(tmp_path / "run")
    built.log.open_metrics(0)
    built.step = 5
    metrics = built.evaluate()
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    logged = json.loads(line)
    assert logged["step"] == 5
    assert {name: logged[f"eval/{name}"] for name in metrics} == metrics


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ("f", "checkpoint"),  # only the final one cannot be written
        ("fcfc", "final"),  # the disk is full for a while
        ("fc" * 20, None),
    ],
)
def test_a_result_that_cannot_be_saved_is_not_lost(tmp_path, monkeypatch, failures, expected):
    built = make(tmp_path, max_steps=2)
    built.run()
    left, real = list(failures), checkpoint.commit

    def commit(final, *arguments):
        if left and left[0] == final.name[0]:
            left.pop(0)
            raise errors.CheckpointError(f"cannot save {final}: No space left on device")
        return real(final, *arguments)

    monkeypatch.setattr(checkpoint, "commit", commit)
    monkeypatch.setattr("sft.train.engine.SECONDS_OF_WAIT", 0)
    if expected == "final":
        built.save_final(0)
        assert checkpoint.fault(tmp_path / "final_checkpoint") is None
        return
    with pytest.raises(errors.CheckpointError, match=r"cannot save .*final_checkpoint") as error:
        built.save_final(0)
    saved = tmp_path / "checkpoint_step_2"
    assert saved.exists() == (expected == "checkpoint")
    assert not left
    if expected:
        assert f"done and saved in {saved}" in str(error.value)
        again = make(tmp_path, max_steps=2)
        again.train_to_end(saved)
        again.save_final(0)
        assert checkpoint.fault(tmp_path / "final_checkpoint") is None


def test_what_is_saved_at_the_end_is_the_model_and_its_card(tmp_path):
    built = make(tmp_path)
    built.save_final(0)
    for card in (None, "# Card"):
        built.add_card(card)
        folder = tmp_path / "final_checkpoint"
        assert checkpoint.fault(folder) is None
        files = {path.name for path in folder.iterdir()} - {"model.safetensors", "config.json"}
        readme = {"README.md"} if card else set()
        assert files - {"generation_config.json", checkpoint.MANIFEST} == readme
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(value, weights(built)[name]) for name, value in saved.items())
    assert (folder / "README.md").read_text() == "# Card"


def test_a_line_of_a_step_is_written_at_its_times(tmp_path):
    built = make(tmp_path, log_steps=5)
    built.log, advanced = tiny.Said(), []
    values = {"train/loss": 0.5, "train/learning_rate": 1e-3, "train/grad_norm": 2.0}
    values["speed/tokens_per_second"] = 1234.4
    for step in range(1, 9):
        built.step = step
        built._report(values, lambda *given: advanced.append(given), 2.0)
    assert built.log.lines == [
        f"step     {step}/8  loss 0.5000  lr 1.00e-03  |g| 2.000  1,234 tokens/s  ETA {left} s"
        for step, left in ((1, 14), (5, 6), (8, 0))
    ]
    assert advanced == [(1, "loss 0.5000  1,234 tokens/s")] * 8


@pytest.mark.parametrize(
    ("interval", "due"), [(None, []), (0, []), (1, [*range(1, 8)]), (3, [3, 6]), (4, [4]), (8, [])]
)
def test_what_is_done_every_few_steps_is_not_done_after_the_last(tmp_path, interval, due):
    built, found = make(tmp_path), []
    for built.step in range(1, 9):
        found += [built.step] if built._is_due(interval) else []
    assert found == due


@pytest.mark.parametrize("start", [0, 1])
def test_a_run_reports_where_it_is_to_its_watchdog_and_on_its_bar(tmp_path, start):
    built, seen = make(tmp_path, save_steps=3, max_steps=4), []
    built.step = start
    built.guard, built.log = tiny.Spy(built.guard, seen), tiny.Spy(built.log, seen)
    built.run()
    assert [each for each in seen if each[0] in ("section", "progress", "open_metrics")] == [
        ("open_metrics", start),
        *[("section", "save")] * (start == 0),  # it proves that it can save
        ("section", "step"),
        ("progress", "train", 4, start),
        ("section", "save"),
    ]
    marked = [step for name, *given in seen for step in given if name == "mark"]
    assert marked == [*range(start + 1, 5)]


def test_training_to_the_end_predicts_from_a_probe_what_is_left(tmp_path):
    built = make(tmp_path)
    built.log = tiny.Said()
    built.resume = lambda folder: setattr(built, "step", int(folder.name))
    built.probe_seconds_per_step = lambda: 3.0
    built.run = lambda: time.sleep(0.01)
    seconds = built.train_to_end(tmp_path / "5")
    assert seconds.keys() == {"training_seconds", "predicted_training_seconds"}
    assert seconds["predicted_training_seconds"] == 9.0
    assert 0.01 <= seconds["training_seconds"] < 3
    assert built.log.lines == ["training: 8 steps, about 9 s (probed)"]


@pytest.mark.parametrize(("engine_name", "factor"), [("ddp", 1), ("deepspeed", 3)])
def test_a_trial_with_zero_runs_no_backward_pass_and_counts_it(
    tmp_path, monkeypatch, engine_name, factor
):
    built, passes = make(tmp_path), []
    built.train = built.train.model_copy(update={"engine": engine_name})
    next(built.task.model.parameters()).register_hook(lambda _: passes.append(1))
    monkeypatch.setattr(engine, "time", Has(perf_counter=iter([10.0, 12.0]).__next__))
    assert built.try_out([[0, 1], [2]]) == 2.0 * factor
    assert len(passes) == (2 if engine_name == "ddp" else 0)


def test_what_was_skipped_before_is_in_the_message(tmp_path):
    for allowed, expected in ((0, False), (1, True)):
        built = make(tmp_path, skip_nonfinite=allowed)
        built.task.model.get_input_embeddings().weight.data.fill_(float("nan"))
        for _ in range(allowed):
            built.optimizer_step()
        with pytest.raises(errors.NonFiniteError) as error:
            built.optimizer_step()
        found = "exists. Skipped before it: 1 (train.skip_nonfinite). Examples:" in str(error.value)
        assert found == expected


@pytest.mark.parametrize(("change", "is_changed"), [({}, False), ({"log_steps": 3}, True)])
def test_a_resume_reports_whether_settings_have_changed(tmp_path, change, is_changed):
    folder, seen = make(tmp_path).save(), []
    built = make(tmp_path, **change)
    built.keeper, built.log = tiny.Spy(built.keeper, seen), tiny.Said()
    built.resume(folder)
    ((name, *given),) = seen
    assert (name, given[0], given[1]["step"]) == ("continue_from", folder, 0)
    assert given[2] is is_changed
    assert built.log.lines[0] == f"resumed from {folder} after step 0"


@pytest.mark.parametrize("fault", ["", "other weights", "unreadable"])
def test_a_checkpoint_is_read_back_before_the_first_step(tmp_path, fault):
    built, read = make(tmp_path), engine.Engine.read
    built.log = Log(tmp_path / "run")

    def damaged(folder):
        if fault == "unreadable":
            raise OSError("no such bytes")
        state = read(built, folder)
        if fault:
            next(built.task.model.parameters()).data += 1
        return state

    built.read = damaged
    if fault:
        reason = {"unreadable": "no such bytes"}.get(
            fault, "the weights that were read back differ"
        )
        with pytest.raises(errors.CheckpointError, match=f"cannot be used: .*{reason}"):
            built.prove_saving()
    else:
        built.prove_saving()
        taken = (tmp_path / "run/training.log").read_text()
        assert "step 0, read back" in taken


def whole_batch_task(built, waits_in, starved):
    """Makes the task one that compares the examples of a batch; returns what it was given."""
    seen, real = [], built.task.loss
    built.task.needs_global_batch, built.parallel.waits_in = True, waits_in

    def fail(batch, place):
        if starved == place and len(batch.input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def summarise(model, batch):
        fail(batch, "before")
        with torch.no_grad():
            model(input_ids=batch.input_ids)
        fail(batch, "behind")
        return batch.input_ids[:, :1] * torch.tensor([1, 2])

    built.task.summarise = summarise
    built.task.set_global_batch = lambda *given: seen.append((*given, torch.rand(1).item()))
    built.task.loss = lambda model, batch: (fail(batch, "loss"), real(model, batch))[1]
    return seen


@pytest.mark.parametrize(
    ("max_tokens", "waits_in", "starved"),
    [
        (1, "never", ""),
        (60, "never", ""),
        (10_000, "never", ""),
        (60, "never", "before"),
        (60, "never", "behind"),
        (60, "forward", "behind"),
        (60, "never", "loss"),
    ],
)
def test_a_task_of_whole_batches_gets_the_summary_of_each_example(
    tmp_path, max_tokens, waits_in, starved
):
    rows = tiny.examples(0, 11)
    built = make(tmp_path, rows)
    built.task.budget = batches.Budget(max_tokens, "padded")
    seen = whole_batch_task(built, waits_in, starved)
    ids, micro_batches = built.window(0)
    values = built.optimizer_step()
    found, table, supervised, drawn = seen[-1]
    assert found == ids
    assert supervised == values["train/supervised_tokens"]
    if len(micro_batches) == 1:
        assert table is None
    else:
        firsts = [rows[i].ids[0] for i in ids]
        assert table.tolist() == [[first, 2 * first] for first in firsts]
    other = make(tmp_path, rows)
    again = whole_batch_task(other, "never", "")
    assert other.optimizer_step()["train/supervised_tokens"] == supervised
    assert again[0][-1] == drawn  # whatever the cut, the same random numbers


def test_a_task_of_whole_batches_ends_where_a_pass_cannot_be_repeated(tmp_path):
    built = make(tmp_path)
    whole_batch_task(built, "forward", "before")
    with pytest.raises(errors.OutOfMemory, match=r"rank 0: .* of step 1 that cannot be repeated"):
        built.optimizer_step()


@pytest.mark.parametrize("max_tokens", [60, 10_000])
def test_a_trial_of_a_task_of_whole_batches_summarises_what_is_cut(tmp_path, max_tokens):
    built = make(tmp_path)
    built.task.budget = batches.Budget(max_tokens, "padded")
    seen, micro_batches = whole_batch_task(built, "never", ""), built.window(0)[1]
    real, summarised = built.task.summarise, []
    built.task.summarise = lambda *given: summarised.append(real(*given))
    built.try_out(micro_batches)
    assert [given[:3] for given in seen] == [([], None, 0.0)]
    assert len(summarised) == (len(micro_batches) if len(micro_batches) > 1 else 0)


def test_the_seed_of_a_pass_is_a_function_of_seed_step_and_place(tmp_path):
    built = make(tmp_path, seed=5)
    built.step = 3
    for micro_batch, place in (([8, 9], 1), ([7], 0), ([], 3)):
        built._seed(micro_batch, [7, 8, 9])
        assert torch.initial_seed() == ((5 * 1_000_003 + 3) << 20) + place


@pytest.mark.parametrize("own", [None, Oom("own", [1])])
@pytest.mark.parametrize("other", [None, Oom("other", [2])])
def test_ranks_agree_on_the_first_of_them_whose_memory_ran_out(tmp_path, monkeypatch, own, other):
    """A stand-in for the collectives of two ranks, of which this is the second."""
    built, guard = make(tmp_path), OomGuard()
    guard.oom = own
    kinds = []

    def reduce(flag, kind):
        kinds.append(kind)
        return flag + (other is not None)

    built.accelerator = Has(num_processes=2, device=torch.device("cpu"), reduce=reduce)
    monkeypatch.setattr(engine, "gather_object", lambda mine: [other, *mine])
    assert built._oom_on_any_rank(guard) == (other or own)
    assert built._on_any_rank(own is not None) == bool(own or other)
    assert set(kinds) == {"sum"}
    assert built._is_cut([[1]])
