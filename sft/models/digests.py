"""Makes digests of a base model: of its configuration and weights, or of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import cached_file

from sft.config.adapters import ADAPTER
from sft.config.schema import Model
from sft.models.pretrained import architecture, explain_load_errors
from sft.runtime.checkpoint import sha256

SAMPLE = 4096  # bytes at each end of a tensor that enter a digest


def model_sha256(config: Model) -> str:
    """Hashes the base model's config.json and weights; where they are stored does not matter."""
    digest = hashlib.sha256(architecture(config).to_json_string().encode())
    if config.new_tokens:
        digest.update(json.dumps(config.new_tokens).encode())
    if config.adapter:
        digest.update(sha256(Path(config.adapter, ADAPTER)).encode())
    if config.init == "pretrained":
        for part in _sample_weights(config):
            digest.update(part)
    return digest.hexdigest()


def weights_sha256(config: Model) -> str:
    """Hashes only the weights: an adapter outlives a version of transformers, and versions read
    config.json differently."""
    return hashlib.sha256(b"".join(_sample_weights(config))).hexdigest()


def _sample_weights(config: Model) -> Iterator[bytes]:
    """Yields name, size and header of each file, and SAMPLE bytes at both ends of each tensor.

    Samples are enough, since training changes most tensors everywhere.
    """
    with explain_load_errors(config.name):
        found = cached_file(config.name, "config.json", revision=config.revision)
    for path in sorted(Path(str(found)).parent.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = min(size, int.from_bytes(file.read(8), "little"))
            header = file.read(length)
            yield f"{path.name} {size}".encode() + header
            for start, end in _tensor_ranges(header):
                for place in (start, max(start, end - SAMPLE)):
                    file.seek(8 + length + place)
                    yield file.read(min(SAMPLE, end - start))


def _tensor_ranges(header: bytes) -> list[tuple[int, int]]:
    """Returns (start, end) of the tensors of a file; none if its header is damaged."""
    try:
        entries = json.loads(header).items()
        places = [each["data_offsets"] for name, each in entries if name != "__metadata__"]
        return sorted((int(start), int(end)) for start, end in places)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
