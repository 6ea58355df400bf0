"""Fixtures that several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Directory of the real model, converted: from TEST_MODEL_DIR, else fetched into the user's cache once."""
    given = os.environ.get("TEST_MODEL_DIR")
    if given:
        return Path(given)
    from prfaas.services.model_store import ensure_model

    return ensure_model("smollm2")
