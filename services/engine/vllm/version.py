"""Which vLLM releases the connector is for. vLLM calls its connector interface experimental, and it has changed in
every few releases: one that nobody has tried could store KV in another order without an error."""

from __future__ import annotations

from prfaas.common.errors import ConfigError

SUPPORTED = ("0.32",)
"""Series that tests/vllm has passed with."""


def check_version(version: str) -> None:
    """Raises ConfigError for a release outside the supported series."""
    release = version.split("+", 1)[0]
    if ".".join(release.split(".")[:2]) not in SUPPORTED:
        series = ", ".join(f"{each}.x" for each in SUPPORTED)
        raise ConfigError(
            [f"vLLM {version} is not supported, this PrfaaS is tested with {series}: install one (make vllm-env)"]
        )
