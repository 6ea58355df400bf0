"""Fixtures of the tokenizer's and the emulated engine's tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """A converted SmolLM2 directory; `make test` makes one and names it in PRFAAS_TEST_MODEL."""
    path = os.environ.get("PRFAAS_TEST_MODEL", "")
    if not path:
        pytest.skip("PRFAAS_TEST_MODEL does not name a model directory")
    return Path(path)
