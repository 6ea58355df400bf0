"""Which prompts begin alike, as block ids, without a token being made.

A block is `block_tokens` tokens of a prompt; the last may be shorter. Equal ids mean equal whole prefixes up to the
block's end, different ids different ones, as in the `hash_ids` of Mooncake's traces; ids mean nothing across workloads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

DEFAULT_BLOCK_TOKENS = 512
NO_GROUP = -1


class Segment(NamedTuple):
    """Tokens [start, start + tokens) of an endless stream; `prompts.py` makes a stream's tokens from its number."""

    stream: int
    start: int
    tokens: int


class Prefixes(Protocol):
    """`index` is a request's place in its workload."""

    @property
    def block_tokens(self) -> int: ...

    def block_ids(self, index: int) -> NDArray[np.int64]:
        """Of the prompt, ceil(prompt_tokens / block_tokens) of them. The first prompt_tokens // block_tokens are whole;
        a shorter last one stands for exactly this prompt."""
        ...

    def sequence_block_ids(self, index: int) -> NDArray[np.int64]:
        """Of the whole blocks of prompt and output together, as far as their identity is known: what a cache holds when
        the request has ended. The next turn of a conversation begins with them."""
        ...

    def segments(self, index: int) -> tuple[Segment, ...]:
        """Of the whole prompt, in order."""
        ...

    def new_segments(self, index: int) -> tuple[Segment, ...]:
        """Of what this turn adds to the conversation; all of the prompt in a first turn."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StreamPrefixes:
    """Prompts of two parts: the first tokens of a group's stream (a shared prefix), then the first tokens of the
    request's own stream. The turns of a conversation have one own stream and take more and more of it.

    Columns over requests: `group` (NO_GROUP = no shared prefix), `own` (number of the own stream, 0 …; a stream always
    follows the same group), `own_tokens`, `new_tokens` (the last of own_tokens, added by this turn), `output_tokens`.
    `group_tokens` is over groups.
    """

    block_tokens: int
    group_tokens: NDArray[np.int64]
    group: NDArray[np.int32]
    own: NDArray[np.int64]
    own_tokens: NDArray[np.int64]
    new_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    _group_base: NDArray[np.int64] = field(init=False)
    _own_base: NDArray[np.int64] = field(init=False)
    _partial_base: int = field(init=False)

    def __post_init__(self) -> None:
        # Ids are dense: first those of the groups' whole blocks, then those of the own streams, then one a request for
        # a last block that isn't full. A block with the seam between the two parts belongs to the own stream.
        group_blocks = self.group_tokens // self.block_tokens
        shared = self._shared_tokens()
        ends = (shared + self.own_tokens + self.output_tokens) // self.block_tokens - shared // self.block_tokens
        own_blocks = np.zeros(int(self.own.max(initial=-1)) + 1, np.int64)
        np.maximum.at(own_blocks, self.own, ends)
        bases = np.concatenate(([0], np.cumsum(group_blocks), np.cumsum(own_blocks) + group_blocks.sum()))
        object.__setattr__(self, "_group_base", bases[: group_blocks.size])
        object.__setattr__(self, "_own_base", bases[group_blocks.size : group_blocks.size + own_blocks.size])
        object.__setattr__(self, "_partial_base", int(bases[-1]))

    def block_ids(self, index: int) -> NDArray[np.int64]:
        shared = self.shared_tokens(index)
        end = shared + int(self.own_tokens[index])
        whole = self._whole_block_ids(index, shared, end)
        if end % self.block_tokens == 0:
            return whole
        return np.append(whole, self._partial_base + index)

    def sequence_block_ids(self, index: int) -> NDArray[np.int64]:
        shared = self.shared_tokens(index)
        return self._whole_block_ids(index, shared, shared + int(self.own_tokens[index] + self.output_tokens[index]))

    def segments(self, index: int) -> tuple[Segment, ...]:
        own = Segment(int(self.own[index]), 0, int(self.own_tokens[index]))
        return (*self._group_segment(index), own)

    def new_segments(self, index: int) -> tuple[Segment, ...]:
        new, end = int(self.new_tokens[index]), int(self.own_tokens[index])
        own = Segment(int(self.own[index]), end - new, new)
        return (own,) if end > new else (*self._group_segment(index), own)

    def shared_tokens(self, index: int) -> int:
        group = int(self.group[index])
        return 0 if group == NO_GROUP else int(self.group_tokens[group])

    def _shared_tokens(self) -> NDArray[np.int64]:
        if not self.group_tokens.size:
            return np.zeros(self.group.size, np.int64)
        return np.where(self.group == NO_GROUP, 0, self.group_tokens[self.group])

    def _group_segment(self, index: int) -> tuple[Segment, ...]:
        shared = self.shared_tokens(index)
        # Streams of groups have negative numbers, so that they never meet the own ones.
        return (Segment(-1 - int(self.group[index]), 0, shared),) if shared else ()

    def _whole_block_ids(self, index: int, shared: int, end: int) -> NDArray[np.int64]:
        of_group = shared // self.block_tokens
        of_own = end // self.block_tokens - of_group
        base = int(self._own_base[self.own[index]])
        own = np.arange(base, base + of_own, dtype=np.int64)
        if not of_group:
            return own
        base = int(self._group_base[self.group[index]])
        return np.concatenate((np.arange(base, base + of_group, dtype=np.int64), own))


@dataclass(frozen=True, slots=True, eq=False)
class TracePrefixes:
    """Block ids that a trace gives. Request i has ids[offsets[i] : offsets[i + 1]], ceil(prompt_tokens[i] /
    block_tokens) of them; a negative id is a block that nothing else begins with."""

    block_tokens: int
    prompt_tokens: NDArray[np.int64]
    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]

    def block_ids(self, index: int) -> NDArray[np.int64]:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def sequence_block_ids(self, index: int) -> NDArray[np.int64]:
        start = int(self.offsets[index])
        return self.ids[start : start + int(self.prompt_tokens[index]) // self.block_tokens]

    def segments(self, index: int) -> tuple[Segment, ...]:
        ids = self.block_ids(index).tolist()
        last = int(self.prompt_tokens[index]) - (len(ids) - 1) * self.block_tokens
        whole = [Segment(block, 0, self.block_tokens) for block in ids[:-1]]
        return (*whole, Segment(ids[-1], 0, last))

    def new_segments(self, index: int) -> tuple[Segment, ...]:
        return self.segments(index)
