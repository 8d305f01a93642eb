"""Runs a script of the project with one more line in the list of tasks: toy_worker.py SCRIPT ..."""

import runpy
import sys

from sft.tasks.registry import TASKS

TASKS["toy"] = ("toy_task:ToyConfig", "toy_task:ToyTask")

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
