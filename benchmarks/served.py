"""What `make serve-test` measures of each kind of artefact in each server that is installed.

    PYTHONPATH=.:tests:tests/support python benchmarks/served.py [--parts own llama.cpp vllm]
        [--json benchmarks/results/served.json]

The artefacts are a LoRA run on the embedded model whose adapter has random weights (std 0.02), its
merge in fp32, and GGUF files of it. KL is in nats per token, of the server from the weights that it
serves (`kl`) and of these from the trained model (`artefact`). vLLM needs a program `vllm`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf_files
import httpx2
from conftest import ROOT
from test_export import finished

from sft.cli import prepare_libraries
from sft.errors import VerificationError
from sft.runtime.children import kill_tree
from sft.runtime.console import make_console, table, write_json
from sft.runtime.log import Log
from sft.serve import merge, served, vllm
from sft.serve.connector import AccelerateConnector
from sft.serve.server import ChatServer

RESULTS = ROOT / "benchmarks/results/served.json"
PARTS = ("own", "llama.cpp", "vllm")
QUANTISATIONS = ("f32", "f16", "q8_0", "q4_0")
PORT = 8765  # of vLLM
QUESTIONS = ("remind me to sew at 7 am", "book a table for two", "play jazz", "call my brother")


@contextmanager
def own_server(name: Path) -> Iterator[str]:
    connector = AccelerateConnector(name, mixed_precision="no", log=Log(None))
    with ChatServer(connector, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()


@contextmanager
def vllm_server(name: Path) -> Iterator[str]:
    words = [*vllm.command(str(name)), "--host", "127.0.0.1", "--port", str(PORT)]
    words += ["--dtype", "float32", "--enforce-eager"]
    url = f"http://127.0.0.1:{PORT}"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                try:
                    httpx2.get(f"{url}/health")
                    break
                except httpx2.HTTPError:
                    time.sleep(1)
            yield url
        finally:
            kill_tree(process.pid)


def measure(url: str, model: str | None = None, **artefact: Path) -> dict[str, Any]:
    """Returns the verdict, and what each check measured."""
    path = next(iter(artefact.values()))
    with suppress(VerificationError):  # the report has it
        served.serve_test(url, lambda _: None, model=model, **artefact)
    folder = path.parent if path.is_file() else path
    report = json.loads((folder / served.REPORT).read_text())[path.name]
    checks = report["checks"]
    found = {"verdict": report["verdict"], "server": report["server"]}
    found["prompts"] = report["num_prompts"]
    for name in ("kl", "artefact"):
        if isinstance(checks.get(name), dict):
            found[name] = checks[name]["measured"]
            found[f"{name}_limit"] = checks[name]["limit"]
    found["tokens"] = checks["tokens"]["what"]
    found["differs"] = [
        n for n, each in checks.items() if isinstance(each, dict) and not each["ok"]
    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    prepare_libraries()
    found = json.loads(args.json.read_text()) if args.json.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        run, merged = Path(name, "run"), Path(name, "merged")
        (run / "evaluation").mkdir(parents=True)
        rows = ({"index": i, "key": "0", "prompt": q} for i, q in enumerate(QUESTIONS))
        (run / "evaluation/predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        finished(run, "lora", std=0.02)
        merge.merge(run, merged, "fp32", lambda _: None)
        if "own" in args.parts:
            with own_server(run) as url:
                found["LoRA run, own"] = measure(url, run=run)
            with own_server(merged) as url:
                found["merge fp32, own"] = measure(url, merged=merged)
        if "llama.cpp" in args.parts:
            for kind in QUANTISATIONS:
                file = gguf_files.write_gguf(merged, merged / f"{kind}.gguf", kind)
                with gguf_files.llama_server(file) as url:
                    found[f"GGUF {kind}, llama.cpp"] = measure(url, gguf=file)
        if "vllm" in args.parts and vllm.is_installed():
            with vllm_server(run) as url:
                found["LoRA run, vLLM"] = measure(url, "run", run=run)
            with vllm_server(merged) as url:
                found["merge fp32, vLLM"] = measure(url, merged=merged)
    write_json(args.json, found)
    rows = [
        [key, row["verdict"], *(f"{row[n]:.2g}" if n in row else "" for n in ("kl", "artefact"))]
        for key, row in found.items()
    ]
    make_console().print(table("Served", ("what", "verdict", "kl", "artefact"), rows))


if __name__ == "__main__":
    main()
