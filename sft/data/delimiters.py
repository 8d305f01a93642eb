"""Finds the character that separates the cells of a CSV, or refuses to guess.

The first records are read with each candidate by the csv module itself, in its strict form. A
candidate fits if it gives a header of several columns, each named once, and every record has as
many cells. If several fit, the file could be read in several ways, so it is refused.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable

CANDIDATES = (",", ";", "\t", "|")
SAMPLE_BYTES, SAMPLE_LINES = 1 << 20, 1000
EXCEL = re.compile(r'"?sep=(.)"?\r?\n?')  # a first line with which Excel names the character
ASK = "set data.csv_delimiter to the right one"


def find_delimiter(lines: list[str], is_whole: bool, usual: str) -> str:
    """Returns the delimiter of a CSV that begins with these lines.

    `is_whole`: they are the whole file, so that the last record is not cut. `usual`: the delimiter
    to expect by the name of the file; it is used where no candidate separates the header. Raises
    ValueError if several fit, or if another character seems to separate the cells.
    """
    trials = {each: _try(lines, is_whole, each) for each in CANDIDATES}
    splitting = {each: share for each, (columns, share) in trials.items() if columns > 1}
    if usual == "\t" in splitting:  # what .tsv says
        return usual
    fitting = [each for each, share in splitting.items() if share == 1]
    if len(fitting) > 1:
        names = " and ".join(map(repr, fitting))
        raise ValueError(f"cells that {names} could separate equally well; {ASK}")
    if splitting:  # where none fits, some records are bad, and will be reported
        return max(splitting, key=lambda each: (splitting[each], each == usual))
    other = _other_delimiter(lines)
    if other in CANDIDATES:  # its header names a column twice, as the reader will report
        return other
    if other:
        raise ValueError(
            f"cells that {other!r} seems to separate; save it with commas, semicolons, tabs or "
            f"bars, or {ASK}"
        )
    return usual


def _try(lines: Iterable[str], is_whole: bool, delimiter: str) -> tuple[int, float]:
    """Returns the columns of the header, 0 if two have one name, and the share of records that have
    as many cells."""
    records: list[list[str]] = []
    is_broken = False
    try:
        records += filter(None, csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        is_broken = True
    if not is_whole and len(records) > 1 and not is_broken:
        records.pop()  # the sample may have cut it
    header = records[0] if records else []
    fitting = sum(len(record) == len(header) for record in records)
    columns = len(header) if len(set(header)) == len(header) else 0
    return columns, fitting / (len(records) + (is_broken and is_whole) or 1)


def _other_delimiter(lines: list[str]) -> str:
    """Returns a character that stands between words of the header, as often in every line."""
    lines = [line.rstrip("\r\n") for line in lines if line.strip()]
    for char in dict.fromkeys(lines[0] if len(lines) > 1 else ""):
        parts = lines[0].split(char)
        if char.isalnum() or char in " _-.\"'()" or not all(re.search(r"\w", p) for p in parts):
            continue
        if len({line.count(char) for line in lines}) == 1:
            return char
    return ""
