"""Verbs for models that others use: serve, serve-test, push."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from pathlib import Path

from sft import cli
from sft.commands.use import add_model_options, add_vllm_args, connector_arguments
from sft.config.load import parse_generation
from sft.errors import UserError
from sft.runtime.console import make_console


def serve_options(parser: cli.Parser) -> None:
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument(
        "--engine", choices=["auto", "vllm", "own"], default="auto", help="auto: vllm if installed"
    )
    add_vllm_args(parser)


def serve(args: Namespace) -> None:
    """Answers requests of OpenAI's chat protocol until Ctrl-C."""
    settings = parse_generation(args.overrides).model_dump()
    from sft.runtime.output import show
    from sft.serve import vllm

    if args.engine == "vllm" or (args.engine == "auto" and vllm.is_installed()):
        if args.overrides:
            raise UserError("ARGS: vLLM takes these settings from each request; leave them out")
        words = vllm.command(args.model, args.adapter)
        words += ["--host", args.host, "--port", str(args.port)]
        words += vllm.split_args(args.vllm_args, ("host", "port"))
        show(f"starting vLLM (ENGINE=own: the server of this project): {shlex.join(words)}")
        try:
            os.execvp(words[0], words)
        except OSError as error:
            raise UserError(f"ENGINE=vllm: cannot start vllm: {error.strerror}") from None
    if args.vllm_args:
        raise UserError("VLLM_ARGS: is only read by vLLM, and ENGINE=own or no `vllm` was found")
    from sft.serve import server
    from sft.serve.connector import AccelerateConnector

    connector = AccelerateConnector(**connector_arguments(args))
    with server.ChatServer(connector, args.host, args.port, settings) as serving:
        if args.host not in server.LOOPBACK:
            show(f"{args.host}: other machines can use this server, and it asks for no key")
        show(f"{serving.name} answers at {serving.url}/v1, one request at a time; Ctrl-C ends it")
        serving.serve_forever()


def serve_test_options(parser: cli.Parser) -> None:
    parser.add_argument("--url", required=True, help="address of the server")
    parser.add_argument("--run", type=Path, help="the run that is served (default: outputs/nano)")
    parser.add_argument("--merged", type=Path, help="the merged folder that is served")
    parser.add_argument("--gguf", type=Path, help="the GGUF file that is served")
    parser.add_argument("--model", help="its name at the server (default: the first)")
    parser.add_overrides("section")


def serve_test(args: Namespace) -> None:
    """Compares a server with what was trained; fails if anything differs."""
    from sft.serve import served

    say = make_console().print
    where = args.run, args.merged, args.gguf
    served.serve_test(args.url, say, *where, args.model, args.overrides)


def push_options(parser: cli.Parser) -> None:
    parser.add_argument("--folder", type=Path, required=True, help="a run, or a merged folder")
    parser.add_argument("--repo", required=True, help="name at the hub: user/model")
    parser.add_argument("--license", help="licence of the model, such as apache-2.0")


def push(args: Namespace) -> None:
    """Uploads a run's model or a merged folder, with its card."""
    from sft.serve import push

    say = make_console().print
    say(f"uploaded: {push.push(args.folder, args.repo, args.license, say)}")
