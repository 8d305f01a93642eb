"""Names the extra of the package to install where an optional library is missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from sft.errors import UserError


def require_extra(extra: str, setting: str, modules: Iterable[str]) -> None:
    """Raises UserError if a module that `setting` needs is missing; `extra` installs it."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise UserError(
            f'{setting} needs {", ".join(missing)}, not installed: pip install "sft[{extra}]"'
        )
