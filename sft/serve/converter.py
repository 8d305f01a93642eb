"""Runs llama.cpp's convert_hf_to_gguf.py with a given name of the rules that split text.

    python converter.py path/to/convert_hf_to_gguf.py NAME arguments of the script ...

The script recognises these rules by a digest that covers the whole vocabulary, so it knows those of
published tokenizers only. NAME is one of llama.cpp's own names (`tokenizer.ggml.pre`).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def convert(script: Path, pre: str, arguments: list[str]) -> None:
    """Runs the script with every class that would recognise the rules answering `pre`."""
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    found: Any = importlib.import_module(script.stem)
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "conversion"]
    for module in [found, *modules]:
        for each in list(vars(module).values()):
            if isinstance(each, type) and "get_vocab_base_pre" in vars(each):
                each.get_vocab_base_pre = lambda *_: pre  # type: ignore[attr-defined]
    found.main()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
