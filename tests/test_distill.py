"""Distillation: the transformer over transitions, what it does in context, the task, whole runs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import tiny
import torch
import torch.nn.functional as F
from allocations import allocated_bytes
from conftest import representatives
from safetensors.torch import load_file

from sft.config.load import load_config, with_values
from sft.data import batches
from sft.errors import ConfigError
from sft.models import export
from sft.plan import calibration, dry_run, plan
from sft.plan.trace import Recorder
from sft.runtime import console, hardware, processes
from sft.runtime.log import Log
from sft.runtime.processes import Context
from sft.tasks.distill import grid, histories, report, rollout, task, transformer
from sft.tasks.distill.config import Distill, DistillConfig
from sft.tasks.distill.rollout import play
from sft.tasks.distill.source import Histories
from sft.tasks.distill.transformer import Transformer, window_tokens, with_marks
from sft.tasks.distill.windows import Windows, blank_histories
from sft.tasks.distill.worlds import world_of
from sft.tasks.registry import load_run
from sft.train import engine

pytestmark = pytest.mark.slow

SMALL = Distill(
    context=40,
    width=16,
    num_layers=2,
    num_heads=2,
    num_streams=5,
    num_steps=120,
    search_episodes=2,
    jump_to=3,
    held_out_streams=1,
)
PAIR = SMALL.model_copy(update={"compress": True})
CONFIG = "configs/ad_darkroom.yaml"


def made(settings: Distill, scale: float = 0.3) -> Transformer:
    """A random model whose actions depend strongly on what it has seen."""
    torch.manual_seed(0)
    model = Transformer(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def random_histories(*shape: int, seed: int = 0) -> Histories:
    """Of random actions; whole episodes along the last dimension. The goal is cell 41."""
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randint(5, shape, generator=generator)
    cells, after = torch.empty_like(actions), torch.empty_like(actions)
    at = torch.full(shape[:-1], grid.START)
    for step in range(shape[-1]):
        at = torch.full_like(at, grid.START) if step % 20 == 0 else at
        cells[..., step] = at
        at = after[..., step] = grid.NEXT[at, actions[..., step]]
    return Histories(cells, actions, (after == 41).to(torch.uint8), after)


# --- the model -----------------------------------------------------------------------------------


def test_a_token_has_the_transition_before_it_and_the_present_cell():
    window = random_histories(1, 40)
    tokens = window_tokens(window)[0]
    assert tokens.shape == (40, transformer.NUM_FEATURES)
    for step, token in enumerate(tokens):
        row, column = divmod(int(window.cells[0, step]), 9)
        before = [0.0] * 10 + [1.0]
        if step:
            cell, action, reward, after = (int(x[0, step - 1]) for x in window)
            chosen = [float(i == action) for i in range(5)]
            places = [[(x - 4) / 4 for x in divmod(c, 9)] for c in (cell, after)]
            before = [*places[0], *chosen, float(reward), *places[1], 0.0]
        assert token.tolist() == [*before, (row - 4) / 4, (column - 4) / 4, 0.0, 0.0]


def test_the_window_predicts_behind_every_number_of_transitions():
    """Position t says what a window cut there says: every length from one is trained at once."""
    model, tokens = made(SMALL), window_tokens(random_histories(3, 40))
    whole = model(tokens)[0]
    assert (whole - whole[:, :1]).abs().max() > 0.1
    for length in (1, 2, 17, 39):
        cut = model(tokens[:, :length])[0]
        torch.testing.assert_close(cut, whole[:, :length], rtol=1e-4, atol=1e-5)


def test_two_regions_lie_between_marks():
    window = random_histories(1, 40)
    tokens, marked = window_tokens(window), with_marks(window_tokens(window))
    assert marked.shape[1] == transformer.num_positions(PAIR) == 43
    steps, types = task._layout(PAIR, torch.device("cpu"))
    assert torch.equal(marked[:, steps], tokens)
    assert types.nonzero()[:, 0].tolist() == [19, 39]
    marks = marked[0, [0, 21, 22]]
    assert marks[:, -2:].tolist() == [[1, 0], [0, 1], [1, 0]]  # begin, end, begin
    assert marks[:, :-2].abs().sum() == 0


# --- in context ----------------------------------------------------------------------------------

ROWS = [(41, 0), (41, 1), (0, 0), (31, 5), (40, 2)]


@pytest.mark.parametrize("settings", [SMALL, SMALL.model_copy(update={"slide": 2}), PAIR])
def test_a_cache_gives_what_encoding_the_window_gives(settings):
    model = made(settings)
    quick, slow = (play(model, ROWS, 6, cached=cached) for cached in (True, False))
    assert torch.equal(quick.returns, slow.returns)
    assert quick.returns.std() > 0
    assert (quick.regions, quick.num_forced) == (slow.regions, slow.num_forced)
    if settings.compress:  # rows that end their regions at different times
        assert len(set(quick.regions)) > 3


def test_what_a_row_does_does_not_depend_on_the_others():
    model = made(SMALL)
    together = play(model, ROWS, 5).returns
    alone = torch.cat([play(model, [row], 5).returns for row in ROWS])
    assert torch.equal(together, alone)


def test_the_context_is_the_newest_episodes_of_a_window_as_in_training():
    """Against a loop of one row that keeps transitions, not tokens, and encodes all of them."""
    model, (goal, seed) = made(SMALL), ROWS[0]
    drawn = rollout._uniform(world_of("darkroom"), [(goal, seed)], 6 * 20)[0].tolist()
    seen: list[tuple[int, int, int, int]] = []
    returns = []
    for episode in range(6):
        at, total = grid.START, 0
        for step in range(20):
            first = max(0, episode - 1) * 20  # two episodes fit
            open_step = (at, 0, 0, 0)  # its action is asked for
            columns = torch.tensor([*seen[first:], open_step]).T[:, None]
            logits = model(window_tokens(Histories(*columns)))[0][0, -1]
            upto, action = 0.0, 0
            for action, share in enumerate(logits.softmax(-1).tolist()):  # noqa: B007
                upto += share
                if drawn[episode * 20 + step] <= upto:
                    break
            after = int(grid.NEXT[at, action])
            seen.append((at, action, int(after == goal), after))
            total, at = total + int(after == goal), after
        returns.append(total)
    assert play(model, [(goal, seed)], 6).returns[0].tolist() == returns


@pytest.mark.parametrize(("bias", "ended", "steps"), [(-50.0, 0, set()), (50.0, 60 * 2, {1})])
def test_the_model_says_when_a_region_ends(bias, ended, steps):
    """One that never does is made to when it is full: half the context."""
    model = made(PAIR)
    assert model.kind is not None
    model.kind.bias.data[transformer.ENDS] = bias
    found = play(model, ROWS[:2], 3)
    assert len(found.regions) == ended
    assert set(found.regions) == steps
    assert found.num_forced == (0 if ended else 60 // 20 * 2)


# --- the task ------------------------------------------------------------------------------------


def config(folder: Path, settings: Distill = SMALL, **train: object) -> DistillConfig:
    values = {"output_dir": str(folder), "max_grad_norm": 0.0, "global_batch": 7} | train
    return DistillConfig.model_validate({"distill": settings.model_dump(), "train": values})


def make_engine(asked: DistillConfig, max_tokens: int, dtype: torch.dtype) -> engine.Engine:
    accelerator = processes.start_processes(asked.train)
    found = random_histories(4, asked.distill.num_streams, asked.distill.num_steps)
    budget = batches.Budget(max_tokens, "padded")
    model = made(asked.distill).to(dtype)
    work = task.Distillation(asked, found, model, budget, Context(accelerator))
    plain = work._collate

    def collate(*of: object) -> task.Batch:
        batch = plain(*of)  # type: ignore[arg-type]
        return replace(batch, tokens=batch.tokens.to(dtype))

    work._collate = collate  # type: ignore[method-assign]
    return engine.Engine(work, asked.train, Context(accelerator, Log(None)))


@pytest.mark.parametrize("settings", [SMALL, PAIR])
def test_law_1_any_cut_gives_the_loss_and_gradient_of_a_plain_loop(tmp_path, settings):
    asked, found = config(tmp_path, settings), {}
    for max_tokens in (1, 100, 100_000):
        made_engine = make_engine(asked, max_tokens, torch.float64)
        values = made_engine.optimizer_step()
        gradients = [p.grad.clone() for p in made_engine.task.model.parameters()]
        found[max_tokens] = (values["train/loss"], gradients)
    work, model = made_engine.task, made(settings).double()
    ids, _ = make_engine(asked, 1, torch.float64).window(0)
    total = 0.0
    for number in ids:
        window = work.train.gather([number])
        tokens = window_tokens(window).double()
        actions, types = model(with_marks(tokens) if settings.compress else tokens)
        if types is None:
            loss = F.cross_entropy(actions[0], window.actions[0].long(), reduction="sum")
        else:
            places = [*range(1, 21), *range(23, 43)]
            aims = torch.tensor([0] * 19 + [1] + [0] * 19 + [1])
            loss = F.cross_entropy(actions[0, places], window.actions[0].long(), reduction="sum")
            loss = loss + 0.1 * F.cross_entropy(types[0, places], aims, reduction="sum")
        (loss / (7 * 40)).backward()
        total += loss.item() / (7 * 40)
    expected = [p.grad for p in model.parameters()]
    for value, gradients in found.values():
        assert value == pytest.approx(total, rel=1e-12)
        assert tiny.relative_error(gradients, expected) < 1e-12


def test_the_task_reports_losses_and_accuracies_of_actions_and_types(tmp_path):
    plain = make_engine(config(tmp_path), 1000, torch.float32).optimizer_step()
    pair = make_engine(config(tmp_path, PAIR), 1000, torch.float32).optimizer_step()
    assert "train/type_loss" not in plain
    reported = {name: pair[f"train/{name}"] for name in ("loss", "action_loss", "type_loss")}
    assert reported["loss"] == pytest.approx(reported["action_loss"] + 0.1 * reported["type_loss"])
    assert all(0 <= pair[f"train/{name}_accuracy"] <= 1 for name in ("action", "type"))


def test_a_model_is_loaded_as_it_was_saved(tmp_path):
    made_engine = make_engine(config(tmp_path, PAIR), 1000, torch.float32)
    made_engine.task.save(tmp_path, made_engine.parallel.weights())
    loaded = Transformer(PAIR).eval()
    export.load_weights(loaded, tmp_path)
    tokens = with_marks(window_tokens(random_histories(2, 40)))
    for own, other in zip(loaded(tokens), made_engine.task.model(tokens), strict=True):
        assert torch.equal(own, other)


def test_it_learns_to_go_on_in_context(tmp_path):
    """Histories in which each goal has one action that is always taken: the model, which has seen
    nothing of a new history, has to find out which from the history itself."""
    settings = SMALL.model_copy(update={"eval_seeds": 1})
    found = random_histories(5, 5, 120)
    actions = torch.arange(5)[:, None, None].expand(5, 5, 120)
    model = Transformer(settings)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    windows = Windows(found._replace(actions=actions), settings, 0, 5)
    window = windows.gather(range(20))
    for _ in range(40):
        loss = F.cross_entropy(
            model(window_tokens(window))[0].flatten(0, 1), window.actions.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = model(window_tokens(windows.gather(range(20, 40))))[0]
    right = logits.argmax(-1) == (torch.arange(20, 40) % 5)[:, None]
    assert right[:, 0].float().mean() < 0.5  # nothing is known yet
    assert right[:, 1:].float().mean() > 0.95


def test_a_configuration_is_of_one_task(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("task: distill\ntrain: {output_dir: x}\nmodel: {name: y}\n")
    with pytest.raises(ConfigError, match=r"model.*task: distill has no such section"):
        load_run(path)
    path.write_text("task: distil\ntrain: {output_dir: x}\n")
    with pytest.raises(ConfigError, match="did you mean distill"):
        load_run(path)
    with pytest.raises(ConfigError, match="expected sft, found 'distill'"):
        load_config(CONFIG)
    assert load_run(CONFIG).distill.compress is False


# --- the plan ------------------------------------------------------------------------------------

DARKROOM = with_values(load_run(CONFIG), {"distill.num_steps": 260})
PLANNED = {
    "plain": {},
    "compressed": {"distill.compress": True},
    "dropout, several micro-batches": {"distill.dropout": 0.1, "train.micro_batch": 4},
}


def planned(asked: DistillConfig, ram_bytes: int = 2**33, world: int = 1) -> plan.Plan:
    machine = replace(hardware.detect(), devices=[], ram_available_bytes=ram_bytes)
    return plan.make_plan(asked, task.Distillation.workload(asked), machine, world)


def blank_run(asked: DistillConfig, predicted: plan.Plan) -> engine.Engine:
    """The planned run in this process, on histories that take no memory."""
    settings, alone = asked.distill, dry_run.CpuAccelerator("fp32")
    found = blank_histories(settings)
    model = task.build(settings, 0, dry_run.CPU)
    work = task.Distillation(asked, found, model, predicted.budget, Context(alone))
    _ = work.train._rewarded, work.train._visited  # which are counted with the histories
    return engine.Engine(work, asked.train, Context(alone, Log(None)))


def of_step(predicted: plan.Plan) -> int:
    """Bytes without those of the histories, which are predicted as well."""
    return predicted.memory.allocated - predicted.memory.breakdown["examples"]


def test_windows_are_counted_before_there_are_histories(tmp_path):
    asked = config(tmp_path, PAIR)
    predicted, real = planned(asked), make_engine(asked, 10_000, torch.float32).task
    goals = 73 / 4  # the histories have four
    assert predicted.num_examples == goals * len(real.lengths)
    assert predicted.num_held_out == goals * sum(
        len(batch.tokens) for batch in real._held_out_batches(lambda _: None)
    )
    assert predicted.tokens_per_epoch == goals * sum(real.lengths)
    assert predicted.supervised_share == 40 / 43
    assert predicted.num_trained == sum(p.numel() for p in made(PAIR).parameters())


def test_micro_batches_are_cut_as_asked(tmp_path):
    predicted = planned(config(tmp_path, global_batch=64, gradient_accumulation_steps=4))
    assert (predicted.micro_batch, predicted.micro_batches, predicted.budget.max_rows) == (
        16,
        4,
        16,
    )
    assert planned(config(tmp_path, global_batch=64, micro_batch=8), world=2).micro_batches == 4


@pytest.mark.parametrize("name", representatives(PLANNED))
def test_the_planned_memory_is_what_a_step_allocates(name):
    asked = with_values(DARKROOM, PLANNED[name])
    predicted = planned(asked)
    trained = blank_run(asked, predicted)
    trained.optimizer_step()  # now there is a state of the optimizer
    trained.optimizer.zero_grad()
    assert predicted.memory.method == "traced"
    assert predicted.memory.breakdown["examples"] == 73 * 100 * (4 * 260 + 13 + 3 * 81)
    assert of_step(predicted) == pytest.approx(allocated_bytes(trained), rel=0.005)


@pytest.mark.thorough("the same of the default task in test_plan.py and test_calibration.py")
def test_what_does_not_fit_is_cut(tmp_path):
    asked = with_values(DARKROOM, {"distill.data_dir": str(tmp_path)})
    tight = planned(asked, 44 * 2**20)
    assert 120 < tight.budget.max_tokens < planned(asked).budget.max_tokens
    assert tight.micro_batches == 3  # two would not fit
    assert 0.6 * tight.usable_bytes < tight.memory.reserved <= tight.usable_bytes
    assert "does not fit" in tight.warnings[0]  # the unseen goals, tried with 128 rows
    assert "lower distill.eval_seeds" in tight.warnings[0]
    much = replace(tight, evaluation_bytes=tight.usable_bytes + 1)
    late = asked.train.model_copy(update={"warmup_steps": tight.steps + 1})
    reported, _, slow = plan._warnings(much, late)
    assert f"fewer than the {tight.steps + 1:,} of its warm-up" in slow
    assert len(plan._warnings(much, asked.train)) == 2
    assert "a smaller train.max_tokens or a smaller distill.context help" in reported
    trained, machine = blank_run(asked, tight), hardware.detect()
    work = task.Distillation.workload(asked)
    predicted, measured = calibration.calibrate(
        trained, tight, asked, work, replace(machine, devices=[])
    )
    assert predicted is tight
    found = measured["heaviest_micro_batch_bytes"]
    assert of_step(tight) == pytest.approx(found, rel=0.02)
    assert (tmp_path / "memory.jsonl").exists()


@pytest.mark.parametrize(
    "settings", representatives([SMALL, SMALL.model_copy(update={"slide": 2}), PAIR])
)
def test_trying_the_unseen_goals_takes_what_is_planned(tmp_path, settings):
    settings = settings.model_copy(update={"eval_episodes": 4})
    predicted = planned(config(tmp_path, settings))
    model, recorder = made(settings), Recorder()
    alone = dry_run.CpuAccelerator("fp32")
    alone.unwrap_model = lambda model: model
    for tensors in dry_run.tensors_by_use(model).values():
        recorder.label_tensors(tensors, "held")
    with recorder:
        copy = task.whole_copy(model, settings, alone)
        rollout.play(copy, [(goal, 0) for goal in range(8) for _ in range(16)], 4)
    held = 12 * predicted.num_trained  # gradients, two moments
    held += predicted.memory.breakdown["examples"]
    true_bytes = held + recorder.trace.peak().num_bytes
    assert true_bytes < predicted.generation_bytes < 1.5 * true_bytes


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> list[str]:
    """Overrides of a run on short histories, which are there."""
    folder = tmp_path_factory.mktemp("darkroom")
    settings = SMALL.model_copy(update={"data_dir": str(folder)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "usable_cores", lambda: 1)
        patch.setattr("sft.tasks.distill.source.EPOCHS", 1)
        histories.collect(settings)
    values = {name: getattr(settings, name) for name in ("data_dir", "context", "width")}
    values |= {"num_layers": 2, "num_heads": 2, "num_streams": 5, "num_steps": 120}
    values |= {"search_episodes": 2, "jump_to": 3}
    values |= {"held_out_streams": 1, "eval_episodes": 3, "eval_seeds": 2, "eval_quick": 2}
    train = {"max_steps": 4, "global_batch": 8, "eval_steps": 2, "save_steps": 2}
    named = [f"distill.{key}={value}" for key, value in values.items()]
    return [*named, *(f"train.{key}={value}" for key, value in train.items())]


def train(folder: Path, *overrides: str, world: int = 1) -> str:
    command = ["scripts/train.py", "--config", CONFIG, f"train.output_dir={folder}", *overrides]
    return start(command, folder, world)


def start(command: list[str], folder: Path, world: int) -> str:
    """What was reported by a script that has to succeed."""
    log = folder.with_name(f"{folder.name}.{time.monotonic_ns()}.reported")
    process = forked.start(world, command, log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final_checkpoint" / "model.safetensors")


@pytest.mark.slow
def test_a_run_leaves_its_results_and_resumes_bit_for_bit(collected, tmp_path):
    reported = train(
        tmp_path / "whole", *collected, "train.profile_steps=1", "train.deterministic=true"
    )
    for part in ("2 layers", "transitions", "held-out loss", "in context return", "best", "next"):
        assert part in reported
    plan_json = json.loads((tmp_path / "whole/plan.json").read_text())
    predicted, measured = plan_json["predicted"], plan_json["measured"]
    bytes_seen = measured["heaviest_micro_batch_bytes"]
    assert predicted["allocated_bytes"] == pytest.approx(bytes_seen, rel=0.02)
    assert f"{console.size(predicted['allocated_bytes'])} of" in reported  # the banner
    assert measured["training_seconds"] > 0
    kept = load_run(tmp_path / "whole/config.yaml").train
    assert kept.max_tokens == plan_json["chosen"]["max_tokens"]
    found = json.loads((tmp_path / "whole/evaluation/metrics.json").read_text())
    returns = found["in_context_return"]["all_3"]
    assert len(returns["per_seed"]) == 2
    assert list(returns["per_goal"]) == ["4,2", "5,6", "6,8", "7,2", "3,6", "0,5", "5,8", "5,4"]
    assert returns["mean"] == pytest.approx(sum(found["curve"]) / 3)
    assert (tmp_path / "whole/evaluation" / report.CURVE).read_bytes()[1:4] == b"PNG"
    trace = json.loads((tmp_path / "whole/profile.json").read_text())
    assert any("scaled_dot_product" in event.get("name", "") for event in trace["traceEvents"])
    kept = tmp_path / "whole/checkpoint_step_2"
    train(tmp_path / "again", *collected, f"train.resume_from_checkpoint={kept}")
    one, other = (weights(tmp_path / name) for name in ("whole", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    command = ["scripts/evaluate.py", "--run", str(tmp_path / "whole")]
    start(command, tmp_path / "evaluated", world=2)
    again = json.loads((tmp_path / "whole/evaluation/evaluate/metrics.json").read_text())
    assert again["in_context_return"].keys() == found["in_context_return"].keys()
    assert again["curve"] == pytest.approx(found["curve"], abs=0.1)


WHOLE = ["distill.compress=true", "train.save_steps=null"]


@pytest.fixture(scope="module")
def alone(collected, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "one"
    train(folder, *collected, *WHOLE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", representatives(["ddp", "fsdp", "deepspeed"]))
def test_two_processes_are_one_run_with_every_engine(collected, alone, tmp_path, how):
    """The same losses, and the same returns: those are played by both processes together."""
    stage = ["train.deepspeed_config=configs/deepspeed_z3.json"] if how == "deepspeed" else []
    folder = tmp_path / "two"
    train(folder, *collected, *WHOLE, f"train.engine={how}", *stage, world=2)
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    one, two = (
        json.loads((run / "evaluation/metrics.json").read_text()) for run in (alone, folder)
    )
    assert two["held_out"]["loss"] == pytest.approx(one["held_out"]["loss"], rel=1e-5)
    assert two["in_context_return"]["all_3"]["mean"] == pytest.approx(
        one["in_context_return"]["all_3"]["mean"], abs=0.1
    )
    assert one["regions"]["forced"] + one["regions"]["ended"] > 0
