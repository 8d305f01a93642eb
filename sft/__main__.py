"""Runs `python -m sft VERB`, and the command `sft`."""

import signal


def main() -> None:
    """Runs the verb; Ctrl-C while modules are imported ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `cli.run` reports it
    from sft.commands import main as run_verb

    run_verb()


if __name__ == "__main__":
    main()
