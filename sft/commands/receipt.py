"""Verbs for the receipt of a run: `receipt` writes it, `verify-receipt` checks it."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path

from rich.text import Text

from sft import cli
from sft.errors import VerificationError
from sft.runtime.console import make_console, table


def receipt_options(parser: cli.Parser) -> None:
    parser.add_argument("--run", type=Path, default=Path("outputs/nano"), help="folder of the run")
    parser.add_argument("--by", help="who signs it off, as in 'Ada <ada@example.org>'")
    parser.add_argument("--key", type=Path, help="SSH key: also writes its signature")


def receipt(args: Namespace) -> None:
    """Writes receipt.json into the run's folder, and its signature if there is a key."""
    from sft.verify import receipt

    made, file = receipt.make(args.run, args.by), args.run / receipt.NAME
    receipt.write(made, file)
    console = make_console()
    steps, number = len(made.steps), len(made.checkpoints)
    console.print(f"{file}: {steps:,} steps, {number} checkpoints; sha256 {made.sha256}")
    if args.key:
        console.print(f"signature: {receipt.sign(file, args.key)}")
    # A window that ends with a checkpoint also compares weights.
    last = min((int(step) for step in made.checkpoints if step != "0"), default=steps)
    window = f"{max(1, last - 1)}-{last}"
    console.print(f"check it with: make verify-receipt RUN={args.run} STEPS={window}")


def verify_receipt_options(parser: cli.Parser) -> None:
    parser.add_argument("--run", type=Path, default=Path("outputs/nano"), help="folder of the run")
    parser.add_argument("--receipt", type=Path, help="its receipt (default: that of the folder)")
    parser.add_argument("--steps", help="steps to train again, as in 200-210")
    parser.add_argument("--num-processes", type=int, help="for them (default: as the run had)")
    parser.add_argument("--signers", type=Path, help="file of names and SSH keys: its signature")
    parser.add_overrides("section")


def verify_receipt(args: Namespace) -> None:
    """Prints what holds of a receipt; trains some steps again. Raises VerificationError."""
    from sft.verify import receipt
    from sft.verify.repeat import parse_steps, repeat

    file, console = args.receipt or args.run / receipt.NAME, make_console()
    given = receipt.read(file)
    window = parse_steps(args.steps, given) if args.steps else None
    findings = [*receipt.check_file(given)]
    if args.signers:
        findings.append(receipt.Finding("signature", receipt.signer(file, args.signers), True))
    with tempfile.TemporaryDirectory(prefix="sft-receipt-") as folder:
        config = receipt.configuration(given, Path(folder), args.overrides)
        findings += receipt.check_run(given, args.run)
        findings += receipt.check_inputs(given, config)
        if window and all(each.holds is not False for each in findings):
            repeated = Path(folder, "repeated")
            repeated.mkdir()
            findings += repeat(
                given, config, args.run, window, args.num_processes, repeated, console
            )
    verdicts = {
        True: Text("holds", "green"),
        False: Text("BROKEN", "bold red"),
        None: Text("not compared", "dim"),
    }
    rows: list[list[str | Text]] = [
        [each.what, each.found, verdicts[each.holds]] for each in findings
    ]
    console.print(table(f"Receipt of {given.run}", ("what", "finding", "verdict"), rows, left=3))
    if broken := [each.what for each in findings if each.holds is False]:
        raise VerificationError(f"{file} does not hold: {', '.join(broken)}")
    steps = f", and steps {args.steps} were repeated" if window else ""
    console.print(Text(f"The receipt holds{steps}.", "green"))
