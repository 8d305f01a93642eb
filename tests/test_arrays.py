"""Arrays in files: what is appended comes back, and where each part begins is known."""

from __future__ import annotations

import numpy as np

from sft.data.arrays import Files, mapped


def test_what_is_appended_is_mapped_one_after_the_other(tmp_path):
    with Files(tmp_path) as files:
        begins = [files.append("a", np.arange(n, dtype=np.int32)) for n in (3, 0, 2)]
        assert files.append("empty", np.zeros(0)) == 0
    assert begins == [0, 3, 3]
    array = mapped(tmp_path / "a", np.int32)
    assert array.tolist() == [0, 1, 2, 0, 1]
    assert not array.flags.writeable
    assert mapped(tmp_path / "empty", np.int32).tolist() == []


def test_what_is_written_into_a_map_is_in_the_file(tmp_path):
    (tmp_path / "a").write_bytes(bytes(8))
    mapped(tmp_path / "a", np.int32, "r+")[1] = 5
    assert mapped(tmp_path / "a", np.int32).tolist() == [0, 5]
