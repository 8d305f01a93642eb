"""Source histories of the Darkroom: what PPO did while it learnt each goal, on all cores."""

from sft import cli
from sft.errors import ConfigError
from sft.tasks.distill.config import DistillConfig


def main() -> None:
    config = cli.run_configuration(cli.parser(__doc__).parse_args())
    if not isinstance(config, DistillConfig):
        raise ConfigError(f"expected a configuration of task: distill, found task: {config.task}")
    from sft.tasks.distill import histories

    folder = histories.collect(config.distill)
    returns = histories.curve(folder)
    told = ", ".join(f"{i + 1}: {returns[i]:.2f}" for i in range(0, len(returns), 7))
    print(f"{folder}\nmean return by episode: {told}, {len(returns)}: {returns[-1]:.2f}")


if __name__ == "__main__":
    cli.run(main)
