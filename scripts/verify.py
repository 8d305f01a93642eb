"""Tries a law on a configuration whose model is made small: `resume` or `invariance`."""

from sft import cli


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--law", choices=("resume", "invariance"), required=True)
    parser.add_argument("--num-processes", type=int, help="default: as configured, or by devices")
    args = parser.parse_args()
    config = cli.run_configuration(args)
    from sft.runtime import hardware
    from sft.runtime.console import make_console
    from sft.verify import laws

    if args.law == "resume":
        world = args.num_processes or config.train.num_processes or 1
        laws.verify_resume(config, world, make_console())
    else:
        world = args.num_processes or hardware.default_num_processes(hardware.detect())
        laws.verify_invariance(config, world, make_console())


if __name__ == "__main__":
    cli.run(main)
