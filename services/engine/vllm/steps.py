"""What the scheduler's half of the connector tells the workers' half at each step. vLLM carries it there itself."""

from __future__ import annotations

from dataclasses import dataclass, field

Blocks = tuple[list[int], ...]
"""A request's block ids, one list for each of vLLM's cache groups."""


@dataclass(slots=True)
class SaveStep:
    """After this step tokens [0, computed_tokens) of the request lie in these blocks."""

    transfer_id: str
    blocks: Blocks
    computed_tokens: int


@dataclass(slots=True)
class LoadStep:
    """In this step vLLM computes the token at `end` and needs the KV of [start, end) in these blocks."""

    request_id: str
    transfer_id: str
    blocks: Blocks
    start: int
    end: int


@dataclass(slots=True)
class Step:
    saves: list[SaveStep] = field(default_factory=list)
    loads: list[LoadStep] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Loads that vLLM goes on without: transfer id and reason."""
