"""A receipt holds for its run, its steps repeat, and whatever was changed is found."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import tiny
from conftest import ROOT
from safetensors.torch import load_file, save_file

from sft import commands
from sft.errors import ConfigError, UserError, VerificationError
from sft.runtime import checkpoint
from sft.verify import receipt, repeat, runs

pytestmark = pytest.mark.slow
CONFIG = """\
model: {name: %s, attn_implementation: sdpa}
tuning: {mode: lora, r: 4, lora_dropout: 0.1}
data: {train_path: %s, eval_fraction: 0.1, max_seq_len: 256, cache_dir: %s}
train: {output_dir: %s, max_steps: 6, global_batch: 4, save_steps: 2, save_total_limit: 2,
  precision: fp32, tensorboard: false, learning_rate: 1e-3}
evaluation: {num_examples: 0}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a base, data and the run of a LoRA adapter on them, and its receipt."""
    folder = tmp_path_factory.mktemp("receipt")
    model, data, run = tiny.shallow_nano(folder / "model"), folder / "rows.jsonl", folder / "run"
    lines = (ROOT / "nano/train.jsonl").read_text("utf-8").splitlines(True)
    data.write_text("".join(lines[:40]), "utf-8")
    config = folder / "given.yaml"
    config.write_text(CONFIG % (model, data, folder / "cache", run), "utf-8")
    printed = forked.launch(1, ["-m", "sft", "train", "--config", str(config)])
    assert (run / "final_checkpoint").exists(), printed
    receipt.write(receipt.make(run), run / receipt.NAME)
    return folder


@pytest.fixture
def forking(monkeypatch) -> None:
    """Repeated runs are forks of a process that has imported everything."""

    def launch(world: int, _: Path, program: list[str], *limits: Any) -> str:
        return forked.launch(world, program)

    monkeypatch.setattr(runs, "run_fresh", launch)


def verify(run: Path, *arguments: str) -> None:
    commands.run("verify-receipt", ["--run", str(run), *arguments])


def broken(run: Path, *arguments: str) -> str:
    """Returns what is named as broken."""
    with pytest.raises(VerificationError) as caught:
        verify(run, *arguments)
    return str(caught.value)


@pytest.fixture
def copied(trained, tmp_path) -> Iterator[Path]:
    """A copy of the run, to change; the base and the data are put back after the test."""
    kept = {file: file.read_bytes() for file in trained.rglob("*") if file.parent.name == "nano"}
    kept[trained / "rows.jsonl"] = (trained / "rows.jsonl").read_bytes()
    shutil.copytree(trained / "run", tmp_path / "run")
    yield tmp_path / "run"
    for file, content in kept.items():
        file.write_bytes(content)


def test_a_receipt_holds_and_its_steps_repeat_bit_for_bit(trained, forking, capsys):
    verify(trained / "run", "--steps", "5-6")  # from the checkpoint of step 4, to the end
    shown = capsys.readouterr().out
    assert "BROKEN" not in shown
    for line in ("loss of 2 steps", "gradient norm of 2 steps", "examples of 2 steps"):
        assert f"{line} " in shown
        assert "2 of 2 same" in shown.split(line)[1].splitlines()[0]
    assert "same" in shown.split("repeated final_checkpoint")[1].splitlines()[0]
    assert "same" in shown.split("place")[1].splitlines()[0]
    assert all(len(line) <= 100 for line in shown.splitlines())


def test_a_reviewer_without_the_run_repeats_it_from_its_beginning(
    trained, forking, capsys, tmp_path
):
    alone = shutil.copy(trained / "run" / receipt.NAME, tmp_path / "receipt.json")
    verify(tmp_path / "nothing", "--receipt", str(alone), "--steps", "2-4")
    shown = capsys.readouterr().out
    assert "3 of 3 same" in shown.split("loss of 3 steps")[1].splitlines()[0]
    assert "same" in shown.split("repeated checkpoint_step_4")[1].splitlines()[0]


def test_smaller_micro_batches_in_the_middle_of_a_run_are_another_place(copied, forking, capsys):
    """As they are after memory ran out. Steps before them are those of the place."""
    event = {"event": "cut", "after_step": 4, "tokens": "128 padded"}
    with (copied / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")
    made = receipt.make(copied)
    assert [each.after_step for each in made.attempts] == [0, 4]
    assert [len(made.attempts_of(*steps)) for steps in ((1, 4), (4, 5), (5, 6))] == [1, 2, 1]
    receipt.write(made, copied / receipt.NAME)
    verify(copied, "--steps", "4-6")
    assert "in place of 128 padded" in " ".join(capsys.readouterr().out.split())
    verify(copied, "--steps", "3-4")
    assert "in place of" not in capsys.readouterr().out


def test_another_cut_has_the_same_examples_and_dropout_is_named(trained, forking, capsys):
    verify(trained / "run", "--steps", "1-2", "train.max_tokens=256")
    shown = capsys.readouterr().out
    assert "2 of 2 same" in shown.split("examples of 2 steps")[1].splitlines()[0]
    assert "tuning.lora_dropout" in shown.split("loss of 2 steps")[1].split("gradient")[0]
    assert "BROKEN" not in shown


@pytest.mark.parametrize(("factor", "holds"), [(1 + 1e-6, True), (1 + 1e-4, False)])
def test_losses_of_another_place_have_a_bound(trained, factor, holds):
    steps = receipt.read(trained / "run" / receipt.NAME).all_steps()
    found = {
        number: step._replace(loss=(float.fromhex(step.loss) * factor).hex())
        for number, step in steps.items()
    }
    elsewhere, here = (
        {each.what: each.holds for each in repeat._compare(found, steps, others, 1e-5, [])}
        for others in (["devices: a in place of b"], [])
    )
    assert elsewhere["loss of 6 steps"] is holds
    assert here["loss of 6 steps"] is False


def edit(file: Path, change: Any) -> None:
    values = json.loads(file.read_text("utf-8"))
    change(values)
    file.write_text(json.dumps(values), "utf-8")


def other_loss(values: dict[str, Any]) -> None:
    values["steps"][2][2] = (1.5).hex()


def test_a_changed_receipt_is_found(copied):
    edit(copied / receipt.NAME, other_loss)
    found = broken(copied)
    assert "receipt" in found
    assert "chain of steps" in found


def forged(run: Path, change: Any) -> None:
    """Changes a receipt, its run's log and every digest, as a forger would."""
    edit(run / receipt.NAME, change)
    made = receipt.Receipt.model_validate_json((run / receipt.NAME).read_text("utf-8"))
    link, steps, rows = receipt.START, [], []
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    at = {row["step"]: row for row in map(json.loads, lines) if "data/examples_crc32" in row}
    for step in made.steps:
        link = receipt.next_link(link, step, made.checkpoints.get(str(step.step)))
        steps.append(step._replace(link=link))
        rows.append(at[step.step] | {"train/loss": float.fromhex(step.loss)})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    made = made.model_copy(update={"steps": steps})
    receipt.write(made.model_copy(update={"sha256": made.digest()}), run / receipt.NAME)


def test_a_forged_loss_is_found_by_its_step(copied, forking):
    forged(copied, other_loss)
    verify(copied)  # nothing else contradicts it
    assert "loss of 1 step" in broken(copied, "--steps", "3")


def test_a_forged_setting_is_found_by_its_steps(copied, forking):
    def faster(values: dict[str, Any]) -> None:
        values["configuration"] = values["configuration"].replace("0.001", "0.002")

    text = (copied / "config.yaml").read_text("utf-8")
    assert "0.001" in text
    (copied / "config.yaml").write_text(text.replace("0.001", "0.002"), "utf-8")
    forged(copied, faster)
    found = broken(copied, "--steps", "3-4")
    assert "loss of 2 steps" in found or "steps 3 to 4" in found


def test_a_changed_row_is_found(copied, trained):
    rows = (trained / "rows.jsonl").read_text("utf-8")
    changed = rows.replace("table", "chair", 1)
    assert changed != rows
    (trained / "rows.jsonl").write_text(changed, "utf-8")
    assert "data" in broken(copied)


@pytest.mark.parametrize("where", ["final_checkpoint", "checkpoint_step_4"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_changed_weight_is_found(copied, where, hidden):
    file = copied / where / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    if hidden:  # and the manifest is made to agree
        manifest = copied / where / checkpoint.MANIFEST
        values = json.loads(manifest.read_text("utf-8"))
        values["files"][file.name] = {
            "bytes": file.stat().st_size,
            "sha256": checkpoint.sha256(file),
        }
        manifest.write_text(json.dumps(values), "utf-8")
    assert where in broken(copied)


def test_a_changed_base_is_found(copied, trained):
    file = trained / "model/nano/model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert "model" in broken(copied)


@pytest.mark.parametrize("name", ["audit.json", "plan.json", "config.yaml", "metrics.jsonl"])
def test_a_changed_report_is_found(copied, name):
    file = copied / name
    file.write_text(file.read_text("utf-8").replace("1", "2"), "utf-8")
    assert name in broken(copied)


def test_a_signature_holds_for_its_receipt_and_signer_only(copied, capsys, tmp_path):
    for name in ("ours", "theirs"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(key, check=True)
    commands.run("receipt", ["--run", str(copied), "--key", str(tmp_path / "ours"), "--by", "Ada"])
    signers = tmp_path / "signers"
    for name in ("ours", "theirs"):
        public = (tmp_path / f"{name}.pub").read_text("utf-8")
        signers.write_text(f"ada@example.org {public}", "utf-8")
        if name == "ours":
            verify(copied, "--signers", str(signers))
            assert "ada@example.org" in capsys.readouterr().out
        else:
            with pytest.raises(VerificationError, match="ssh-keygen"):
                verify(copied, "--signers", str(signers))
    signers.write_text(f"ada@example.org {(tmp_path / 'ours.pub').read_text('utf-8')}", "utf-8")
    receipt.write(receipt.make(copied, "Eve"), copied / receipt.NAME)  # sound, not signed
    with pytest.raises(VerificationError, match="ssh-keygen"):
        verify(copied, "--signers", str(signers))


@pytest.mark.parametrize(
    "change",
    [
        {"attempts": []},
        {"steps": [[1, 2, "x", "0x0p+0", "-"]]},
        {"checkpoints": {"x": "0" * 64}},
        {"files": {"../secret": "0" * 64}},
        {"final": 3},
        {"format": 2},
        {"more": 1},
    ],
)
def test_a_receipt_with_other_values_is_refused(trained, tmp_path, change):
    values = json.loads((trained / "run" / receipt.NAME).read_text("utf-8")) | change
    (tmp_path / receipt.NAME).write_text(json.dumps(values), "utf-8")
    with pytest.raises(VerificationError, match=f"is no receipt .*{next(iter(change))}"):
        receipt.read(tmp_path / receipt.NAME)


def test_what_is_missing_is_said(copied, tmp_path):
    given = receipt.read(copied / receipt.NAME)
    for steps in ("0-2", "3-9", "4-3", "x"):
        with pytest.raises(ConfigError, match=r"STEPS: expected .*1 to 6"):
            repeat.parse_steps(steps, given)
    with pytest.raises(UserError, match="make receipt"):
        verify(tmp_path)
    (copied / "history.jsonl").unlink()
    with pytest.raises(UserError, match=r"history\.jsonl"):
        commands.run("receipt", ["--run", str(copied)])
    (copied / receipt.NAME).write_text("{}", "utf-8")
    with pytest.raises(VerificationError, match="is no receipt"):
        verify(copied)


def test_checkpoints_that_were_removed_stay_in_the_receipt(trained):
    given = receipt.read(trained / "run" / receipt.NAME)
    assert given.checkpoints.keys() == {"0", "2", "4"}
    assert not (trained / "run/checkpoint_step_0").exists()
