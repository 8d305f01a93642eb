"""Answers every row of a file, on one process or many; what is answered survives a kill."""

import shutil
from pathlib import Path

from sft import cli
from sft.errors import UserError


def main() -> int:
    parser = cli.Parser(__doc__)
    cli.add_model(parser)
    parser.add_argument("--input", required=True, help="file, folder, glob or hub id of prompts")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to be written")
    args = parser.parse_args()
    settings = cli.generation(args.overrides)
    for name, value in (("INPUT", args.input), ("OUTPUT", args.output.name)):
        if not value:
            raise UserError(f"{name}: required: INPUT=rows.jsonl OUTPUT=answers.jsonl")
    folder = args.output.with_name(f"{args.output.name}.run")  # how it ends, while it runs
    from sft.runtime import launcher

    code = 0
    if launcher.has_ranks_to_start():
        code = launcher.launch_self(folder)
    else:
        from sft.serve import chat

        chat.answer_file(args.input, args.output, folder, cli.model_of(args), settings)
    if code == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    cli.run(main)
