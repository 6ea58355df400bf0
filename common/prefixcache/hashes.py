"""Block keys: chained hashes of token ids.

    root    = H(format, block size, model fingerprint, tenant)
    key[i]  = H(tokens of block i as little-endian uint32, salt = key[i−1])          key[−1] = root

H is BLAKE2b with 16-byte digests; its salt has 16 bytes as well, and costs no compression. A key that two prefixes
share would hand one client's KV to another, so keys must not collide even for somebody who tries: BLAKE2b-128 makes
that 2^64 work, and by chance 10^12 blocks collide with probability 10^24 / 2^129 < 2·10^−15. xxh3-128 takes a fourth
of the time, but its collisions can be constructed; with 64 tokens a block BLAKE2b needs some 2 ms for 128K tokens,
which is little beside that prompt's prefill (`tests/benchmarks/bench_prefixcache.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from prfaas.common.errors import ConfigError
from prfaas.common.kv_layout import MAX_TOKENS

BlockKey: TypeAlias = bytes | int
"""16 bytes of a hash chain, or a trace's block id (a non-negative int). One pool or index has keys of one kind."""

KEY_BYTES = 16
DEFAULT_BLOCK_TOKENS = 64
TRACE_BLOCK_TOKENS = 512
"""Of Mooncake's public traces."""
MAX_BLOCK_TOKENS = 1 << 16
_FORMAT = b"prfaas-prefix-1"


class BlockHasher:
    """Keys of one model's and one tenant's prompts; different models, tenants or block sizes share no key."""

    __slots__ = ("block_tokens", "root")

    def __init__(self, model_fingerprint: str, tenant: str = "", block_tokens: int = DEFAULT_BLOCK_TOKENS) -> None:
        """model_fingerprint: as in `EngineInfo`. tenant: who may share prefixes with one another. Raises
        ConfigError."""
        if not 1 <= block_tokens <= MAX_BLOCK_TOKENS:
            raise ConfigError([f"block_tokens {block_tokens} is not from 1 to {MAX_BLOCK_TOKENS}"])
        digest = blake2b(digest_size=KEY_BYTES, person=_FORMAT)
        for part in (str(block_tokens), model_fingerprint, tenant):
            text = part.encode()
            # With its length before it, or ("ab", "c") and ("a", "bc") would be one.
            digest.update(len(text).to_bytes(8, "little") + text)
        self.root = digest.digest()
        self.block_tokens = block_tokens

    def keys(self, token_ids: NDArray[np.integer[Any]] | Sequence[int], parent: bytes | None = None) -> list[bytes]:
        """One key a complete block of `token_ids`; tokens behind the last complete one are left out.

        token_ids: one dimension, 0 ≤ id < 2^32; int32, int64 and uint32 arrays of the same ids have the same keys. Of a
        prompt give the first n−1 tokens. parent: the key before the first block, to go on where an earlier call ended;
        None = the ids begin the prompt. Raises ValueError, TypeError.
        """
        block_bytes = 4 * self.block_tokens
        data = _token_bytes(token_ids)
        key = self.root if parent is None else parent
        keys = []
        for start in range(0, len(data) - block_bytes + 1, block_bytes):
            key = blake2b(data[start : start + block_bytes], digest_size=KEY_BYTES, salt=key).digest()
            keys.append(key)
        return keys


def _token_bytes(token_ids: NDArray[np.integer[Any]] | Sequence[int]) -> bytes | memoryview:
    ids = np.asarray(token_ids)
    if ids.size == 0:
        return b""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TypeError(f"token ids are a one-dimensional array of integers, not {ids.ndim}-dimensional {ids.dtype}")
    if ids.size > MAX_TOKENS:
        raise ValueError(f"{ids.size} token ids are more than {MAX_TOKENS}")
    if ids.dtype != np.uint32 and (ids.min() < 0 or ids.max() >= 1 << 32):
        raise ValueError(f"token ids from {ids.min()} to {ids.max()} are not within 0 to 2^32 − 1")
    return np.ascontiguousarray(ids, dtype="<u4").data.cast("B")


def trace_keys(block_ids: Sequence[int], prompt_tokens: int, block_tokens: int = TRACE_BLOCK_TOKENS) -> list[int]:
    """The keys of a traced prompt: its block ids, less the one that the first n−1 tokens don't fill.

    block_ids: of ⌈prompt_tokens / block_tokens⌉ blocks; an id stands for the whole prefix up to its block's end, as in
    Mooncake's traces, so it is a key as it is. Raises ValueError for ids that can't be that.
    """
    expected = -(-prompt_tokens // block_tokens)
    if prompt_tokens < 1 or len(block_ids) != expected:
        raise ValueError(
            f"{len(block_ids)} block ids for {prompt_tokens} tokens in blocks of {block_tokens}, not {max(0, expected)}"
        )
    keys = [int(block_id) for block_id in block_ids]
    if min(keys) < 0 or len(set(keys)) != len(keys):
        raise ValueError("a block id is negative or comes twice in one prompt")
    return keys[: (prompt_tokens - 1) // block_tokens]
