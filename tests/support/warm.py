"""What the server of forks computes before the first fork: see forked.py.

Most runs of tests train the embedded model or its first two layers. Which of its parameters a step
reaches is a function of its sizes, found in about two seconds.
"""

import os

from conftest import ROOT

from sft.tasks.registry import load_run, task_of

os.chdir(ROOT)  # the server is started by whichever test needs it first, in a folder of its own
config = load_run(ROOT / "configs/nano.yaml")
for depth in (None, 2):
    task_of(config).skeleton(config, depth)
