"""The version guard, and the release that `make vllm-env` installs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prfaas.common.errors import ConfigError
from prfaas.services.engine.vllm.version import check_version

REPOSITORY = Path(__file__).parents[3]


def test_only_supported_series_pass() -> None:
    check_version("0.32.0")
    check_version("0.32.4+cpu")
    for other in ("0.31.9", "0.33.0", "1.0.0", "unknown"):
        with pytest.raises(ConfigError, match=r"0\.32\.x"):
            check_version(other)


def test_what_the_environment_gets_is_supported() -> None:
    found = re.search(r'^VLLM = "(.+)"$', (REPOSITORY / ".ci" / "vllm_env.py").read_text(), re.MULTILINE)
    assert found is not None
    check_version(found[1])
    assert found[1] in (REPOSITORY / "docs" / "vllm.md").read_text()
