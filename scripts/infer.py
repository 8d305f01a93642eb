"""Talks to a model in the terminal: a run, a checkpoint, a base, an adapter on it, a merged one."""

import sys

from sft import cli
from sft.errors import UserError


def main() -> None:
    parser = cli.Parser(__doc__)
    cli.add_model(parser)
    parser.add_argument("--prompt", help="answer this and stop")
    parser.add_argument("--system", help="system prompt")
    args = parser.parse_args()
    settings = cli.generation(args.overrides)
    from sft.runtime import processes
    from sft.serve import chat
    from sft.serve.connector import AccelerateConnector

    if not processes.leave_process_group():  # of several processes the first one talks
        return
    if args.prompt == "":
        raise UserError('PROMPT is empty; ask something, as in PROMPT="set a timer"')
    connector = AccelerateConnector(**cli.model_of(args))
    connector.load_model_once()
    conversation = chat.Conversation(connector, _write, args.system, **settings)
    if args.prompt is not None:
        conversation.ask(args.prompt)
        return
    print(f"{connector.model_name}: say something; /help lists commands, an empty line ends")
    while conversation.handle(_read()):
        pass


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


if __name__ == "__main__":
    cli.run(main)
