"""What a model's directory says of the model, without any library that could run it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from prfaas.common.errors import ConfigError
from prfaas.common.kv_layout import model_fingerprint

_HASH_BLOCK_BYTES = 1 << 20


def weight_files(directory: Path) -> list[Path]:
    """Raises ConfigError when there are none."""
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise ConfigError([f"engine.model = {str(directory)!r}: no *.safetensors file in it"])
    return weights


def fingerprint(directory: Path) -> str:
    """Of config and weights: engines of either kind must find the same. Reads every byte. Raises ConfigError."""
    files = (directory / "config.json", *weight_files(directory))
    return model_fingerprint((path.name, _digest(path)) for path in files)


def vocabulary(directory: Path) -> int:
    """Raises ConfigError."""
    try:
        config = json.loads((directory / "config.json").read_text())
        return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            [f"engine.model = {str(directory)!r}: its config.json has no vocab_size ({error})"]
        ) from error


def _digest(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()
