"""Algorithm distillation: rooms, playing in context and training, each against its plain form.

    PYTHONPATH=. python benchmarks/distill.py [--parts rooms play train source unseen]

rooms   Steps per second of `Rooms` against a loop over rooms of Gymnasium.
play    Seconds for 20 episodes with a cache of keys and values, against encoding the window for
        every step; the actions have to be the same.
train   Transitions per second of configs/ad_darkroom.yaml, on 1 and on 2 processes of one thread.
source  CPU seconds for one goal and episode: PPO of Stable-Baselines3 against that of many goals
        at once.
unseen  Not a speed: what the source reaches on the unseen goals, were it to learn them. The return
        in context is held against it (docs/research/DISTILL.md).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sft.runtime.console import make_console, write_json
from sft.tasks.distill import grid, rollout, source, task
from sft.tasks.distill.config import DistillConfig
from sft.tasks.distill.worlds import world_of
from sft.tasks.registry import load_run

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/ad_darkroom.yaml"
RESULTS = ROOT / "benchmarks/results/distill.json"
REPEATS = 5
DARKROOM = world_of("darkroom")
STEPS = 40  # of training, the first quarter not counted


def settings() -> DistillConfig:
    config = load_run(CONFIG)
    assert isinstance(config, DistillConfig)
    return config


def rooms() -> dict[str, Any]:
    goals, _ = DARKROOM.split_goals(0)
    many = grid.Rooms(DARKROOM, [goals[i % len(goals)] for i in range(8192)])
    single = grid.Room(DARKROOM, goals[0])

    def together() -> float:
        many.reset()
        actions = torch.randint(5, (20, len(many.goals)))
        started = time.perf_counter()
        for step in actions:
            many.step(step)
        return 20 * len(many.goals) / (time.perf_counter() - started)

    def alone() -> float:
        actions = torch.randint(5, (200, 20)).tolist()
        started = time.perf_counter()
        for episode in actions:
            single.reset()
            for action in episode:
                single.step(action)
        return 4000 / (time.perf_counter() - started)

    vector, loop = (statistics.median(f() for _ in range(REPEATS)) for f in (together, alone))
    return {"rooms": len(many.goals), "steps_per_second": vector, "gymnasium_loop": loop}


def play() -> dict[str, Any]:
    model = task.build(settings().distill, 0, torch.device("cpu")).eval()
    for parameter in model.parameters():  # actions that depend on what was seen
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    _, unseen = DARKROOM.split_goals(0)
    rows = [(goal, seed) for goal in unseen for seed in range(4)]
    seconds, returns = {}, {}
    for name, cached in {"cache": True, "window": False}.items():
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            returns[name] = rollout.play(model, rows, 20, cached=cached).returns
            taken.append(time.perf_counter() - started)
        seconds[name] = statistics.median(taken)
    same = torch.equal(returns["cache"], returns["window"])
    return {"rows": len(rows), "episodes": 20, "seconds": seconds, "same_returns": same}


def train() -> dict[str, Any]:
    """Needs the source histories: `make collect-darkroom`."""
    return {f"processes_{world}": transitions_per_second(world) for world in (1, 2)}


def transitions_per_second(world: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", "scripts/train.py", "--config", str(CONFIG)]
        command += [f"train.output_dir={folder}/run", f"train.max_steps={STEPS}"]
        command += ["train.eval_steps=null", "train.save_steps=null", "train.tensorboard=false"]
        command += ["distill.eval_quick=1", "distill.eval_episodes=1", "distill.eval_seeds=1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    speeds = [row.get("speed/tokens_per_second") for row in map(json.loads, lines)]
    return statistics.median([speed for speed in speeds if speed][STEPS // 4 :])


def sources() -> dict[str, Any]:
    goals, _ = DARKROOM.split_goals(0)
    found = {}
    for name, number in {"ppo": 19, "stable_baselines3": 1}.items():
        started = time.process_time()
        source.SOURCES[name](DARKROOM, goals[:number], 100, 60, 0)
        found[name] = (time.process_time() - started) / 3 / number
    return found


def unseen() -> dict[str, Any]:
    asked = settings().distill
    _, goals = DARKROOM.split_goals(asked.split_seed)
    sizes = asked.num_streams, asked.num_steps
    found = source.ppo(DARKROOM, goals, *sizes, asked.source_seed).returns(asked.episode)
    return {"mean": float(found.mean()), "curve": found.mean((0, 1)).tolist()}


PARTS = {"rooms": rooms, "play": play, "train": train, "source": sources, "unseen": unseen}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in args.parts:
        found[part] = PARTS[part]()
        write_json(RESULTS, found)
    make_console().print_json(data=found)


if __name__ == "__main__":
    main()
