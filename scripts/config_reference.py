"""Prints docs/CONFIG.md, generated from the schemas of all tasks."""

from sft.config.reference import render_reference
from sft.tasks.registry import schemas

if __name__ == "__main__":
    print(render_reference(schemas().values()), end="")
