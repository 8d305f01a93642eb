"""Digests of a model's weights and configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import cached_file

from sft.config.schema import Model
from sft.models.load import architecture, explain_load_errors

SEEN = 4096  # bytes at both ends of a tensor that the digest of a model sees


def model_sha256(config: Model) -> str:
    """A digest of the base model, wherever it lies: its config.json and its files of weights."""
    digest = hashlib.sha256(architecture(config).to_json_string().encode())
    if config.init == "pretrained":
        for part in _sample_weights(config):
            digest.update(part)
    return digest.hexdigest()


def weights_sha256(config: Model) -> str:
    """A digest of the files of weights alone: `config.json` is read differently by each version of
    transformers, and an adapter outlives a version."""
    return hashlib.sha256(b"".join(_sample_weights(config))).hexdigest()


def _sample_weights(config: Model) -> Iterator[bytes]:
    """Of each file the name, the size, the header (names, dtypes, shapes), and of each tensor the
    first and the last SEEN bytes: what changes a model changes most of its tensors throughout."""
    with explain_load_errors(config.name):
        found = cached_file(config.name, "config.json", revision=config.revision)
    for path in sorted(Path(str(found)).parent.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = min(size, int.from_bytes(file.read(8), "little"))
            header = file.read(length)
            yield f"{path.name} {size}".encode() + header
            for start, end in _tensor_ranges(header):
                for place in (start, max(start, end - SEEN)):
                    file.seek(8 + length + place)
                    yield file.read(min(SEEN, end - start))


def _tensor_ranges(header: bytes) -> list[tuple[int, int]]:
    """Where the tensors of a file lie, by its header; none if that is damaged: its loader tells."""
    try:
        told = json.loads(header)
        places = [each["data_offsets"] for name, each in told.items() if name != "__metadata__"]
        return sorted((int(start), int(end)) for start, end in places)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
