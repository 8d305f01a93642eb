"""Checks that all ranks run the same code on the same configuration and data."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from accelerate.utils import gather_object

from sft.config.schema import RunConfig
from sft.errors import PeerError

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")


def collect_facts(config: RunConfig, data: Mapping[str, str]) -> dict[str, str]:
    """Returns what must be equal on all ranks, by name. `data` has digests of the training data.

    Values of the configuration may be secret, so only their digests are in the result.
    """
    values = {
        f"{section}.{key}": sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
    }
    code = [path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    return {
        **values,
        **data,
        **{f"version of {name}": _version(name) for name in LIBRARIES},
        "code of sft": sha256(b"".join(code)).hexdigest(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def refuse_differences(facts: Mapping[str, str]) -> None:
    """Raises PeerError, on all ranks, if `facts` are not the same on all. Collective.

    The value that most ranks have counts as right; with two ranks, that of the first.
    """
    ranks: list[dict[str, str]] = gather_object([dict(facts)])
    problems = []
    for name in sorted({name for each in ranks for name in each}):
        found = [each.get(name, "absent") for each in ranks]
        usual = Counter(found).most_common(1)[0][0]
        for value in dict.fromkeys(value for value in found if value != usual):
            others = [rank for rank, each in enumerate(found) if each == value]
            problems.append(
                f"{name}: {_short(value)} on rank {', '.join(map(str, others))}, "
                f"{_short(usual)} on rank {found.index(usual)}"
            )
    if problems:
        raise PeerError(
            "the ranks are not one run; these differ (values of the configuration by their "
            "digest):\n  " + "\n  ".join(problems) + "\nStart all of them with the same "
            "configuration, data, environment and code."
        )


def _short(value: str) -> str:
    return value[:12] if re.fullmatch(r"[0-9a-f]{64}", value) else value
