"""What a model's KVCache looks like, independent of any engine.

A *layout* lists, per layer, the tensors that decode needs. A *token range* and a *shard* of a layout fix, for every
tensor, an *extent*: how many rows cross the wire, which tokens each row holds, and how many bytes. Sender and
receiver compute the same extents from the same OPEN, so chunks need to name only (layer, tensor, row, offset).

Canonical order (the only one on the wire):

    key, value         [kv_head, token, head_dim]      one row a head, tokens contiguous inside it
    latent             [token, dim]                    one row
    conv, recurrent    the whole state, C order        one row, no tokens: the state after token_end tokens

A windowed tensor (sliding attention) sends only the last `window_tokens` tokens before token_end, so that sizes are
a function of (range, token_end) alone.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prfaas.common.errors import ConfigError

DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3": 1,
    "int8": 1,
    "uint8": 1,
}

# Bounds on what a peer may make us compute with; a layout beyond them is refused before anything is allocated.
MAX_LAYERS = 1024
MAX_TENSORS_PER_LAYER = 8
MAX_DIM = 1 << 20
MAX_TOKENS = 1 << 24


class TensorKind(enum.StrEnum):
    KEY = "key"
    VALUE = "value"
    LATENT = "latent"
    CONV = "conv"
    RECURRENT = "recurrent"

    @property
    def is_state(self) -> bool:
        """A state has a size independent of the number of tokens."""
        return self in (TensorKind.CONV, TensorKind.RECURRENT)


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of one layer.

    kind: what it is. dtype: a key of DTYPE_BYTES. heads: rows of a sharded tensor (KV heads; 1 for latents and
    states). dims: of one token of one head, `(head_dim,)`; of a state, its whole shape. window_tokens: how many
    tokens before token_end are needed; None = all.
    """

    kind: TensorKind
    dtype: str
    heads: int
    dims: tuple[int, ...]
    window_tokens: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.dtype not in DTYPE_BYTES:
            problems.append(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if not 1 <= self.heads <= MAX_DIM or not self.dims or not all(1 <= d <= MAX_DIM for d in self.dims):
            problems.append(f"heads {self.heads} and dims {self.dims} must be from 1 to {MAX_DIM}")
        if self.kind not in (TensorKind.KEY, TensorKind.VALUE) and self.heads != 1:
            problems.append(f"a {self.kind} tensor has one row, not {self.heads}")
        if self.window_tokens is not None and (self.kind.is_state or self.window_tokens < 1):
            problems.append(f"window_tokens {self.window_tokens} does not fit a {self.kind} tensor")
        if problems:
            raise ConfigError([f"KV layout: {p}" for p in problems])

    @property
    def bytes_per_token(self) -> int:
        """Of all heads; 0 for a state."""
        return 0 if self.kind.is_state else self.heads * self.row_bytes_per_token

    @property
    def row_bytes_per_token(self) -> int:
        """Of one head; 0 for a state."""
        return 0 if self.kind.is_state else math.prod(self.dims) * DTYPE_BYTES[self.dtype]

    @property
    def fixed_bytes(self) -> int:
        """Of a state; 0 otherwise."""
        return math.prod(self.dims) * DTYPE_BYTES[self.dtype] if self.kind.is_state else 0


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The tensors of one layer, in wire order. Empty: a layer without a cache (it is complete from the start)."""

    tensors: tuple[TensorLayout, ...]


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens [start, end). `end` is prompt length − 1: decode recomputes the last prompt token itself."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= MAX_TOKENS:
            raise ConfigError([f"token range [{self.start}, {self.end}) is not within [0, {MAX_TOKENS})"])

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `count`: the KV heads [head_start, head_end) of every sharded tensor.

    `head_end` None = to the last. Latents and states have one row and travel with shard 0.
    """

    index: int = 0
    count: int = 1
    head_start: int = 0
    head_end: int | None = None

    def __post_init__(self) -> None:
        head_end = MAX_DIM if self.head_end is None else self.head_end
        if not 0 <= self.index < self.count <= MAX_DIM or not 0 <= self.head_start <= head_end <= MAX_DIM:
            raise ConfigError([f"shard {self.index} of {self.count} with heads [{self.head_start}, {self.head_end})"])


WHOLE = Shard()


@dataclass(frozen=True, slots=True)
class Extent:
    """What of one tensor crosses the wire.

    rows: how many; first_head: the KV head that row 0 is. token_start: the position of the first token that a row
    holds; tokens: how many. row_bytes: bytes of each row (of the state, for a state). rows == 0: nothing.
    """

    rows: int
    first_head: int
    token_start: int
    tokens: int
    row_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class KvLayout:
    """The KVCache of one model: one entry a layer, in layer order."""

    layers: tuple[LayerLayout, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise ConfigError([f"KV layout: {len(self.layers)} layers is not from 1 to {MAX_LAYERS}"])
        if any(len(layer.tensors) > MAX_TENSORS_PER_LAYER for layer in self.layers):
            raise ConfigError([f"KV layout: more than {MAX_TENSORS_PER_LAYER} tensors in a layer"])

    def extent(self, layer: int, tensor: int, tokens: TokenRange, shard: Shard = WHOLE) -> Extent:
        """The part of `layers[layer].tensors[tensor]` that a transfer of `tokens` and `shard` carries."""
        spec = self.layers[layer].tensors[tensor]
        if spec.kind.is_state:
            rows = 1 if shard.index == 0 and tokens.tokens > 0 else 0
            return Extent(rows, 0, tokens.end, 0, spec.fixed_bytes)
        start = tokens.start
        if spec.window_tokens is not None:
            start = max(start, tokens.end - spec.window_tokens)
        count = tokens.end - start
        if spec.heads == 1:
            head_start, head_end = (0, 1) if shard.index == 0 else (0, 0)
        else:
            head_start = shard.head_start
            head_end = spec.heads if shard.head_end is None else min(shard.head_end, spec.heads)
        rows = max(0, head_end - head_start) if count > 0 else 0
        return Extent(rows, head_start, start, count, count * spec.row_bytes_per_token)

    def extents(self, tokens: TokenRange, shard: Shard = WHOLE) -> list[list[Extent]]:
        """Of every tensor: `[layer][tensor]`."""
        return [
            [self.extent(index, tensor, tokens, shard) for tensor in range(len(layer.tensors))]
            for index, layer in enumerate(self.layers)
        ]

    def layer_bytes(self, layer: int, tokens: TokenRange, shard: Shard = WHOLE) -> int:
        return sum(self.extent(layer, t, tokens, shard).total_bytes for t in range(len(self.layers[layer].tensors)))

    def total_bytes(self, tokens: TokenRange, shard: Shard = WHOLE) -> int:
        """Bytes of KV that a transfer of `tokens` and `shard` carries before any codec."""
        return sum(self.layer_bytes(layer, tokens, shard) for layer in range(len(self.layers)))

    @property
    def bytes_per_token(self) -> int:
        return sum(t.bytes_per_token for layer in self.layers for t in layer.tensors)

    @property
    def fixed_bytes(self) -> int:
        return sum(t.fixed_bytes for layer in self.layers for t in layer.tensors)

    @cached_property
    def layout_hash(self) -> str:
        """32 hex digits over the kinds, heads, dims and windows of every layer; not dtype, block size or sharding."""
        digest = hashlib.blake2b(digest_size=16)
        for layer in self.layers:
            for t in layer.tensors:
                digest.update(f"{t.kind}:{t.heads}:{t.dims}:{t.window_tokens};".encode())
            digest.update(b"|")
        return digest.hexdigest()

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The wire dtype of each tensor kind, as OPEN names them. A kind has one dtype in all layers."""
        return {str(t.kind): t.dtype for layer in self.layers for t in layer.tensors}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; `from_dict` reads it back."""
        return {
            "layers": [
                [
                    {"kind": str(t.kind), "dtype": t.dtype, "heads": t.heads, "dims": list(t.dims)}
                    | ({} if t.window_tokens is None else {"window_tokens": t.window_tokens})
                    for t in layer.tensors
                ]
                for layer in self.layers
            ]
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> KvLayout:
        return KvLayout(
            tuple(
                LayerLayout(
                    tuple(
                        TensorLayout(
                            TensorKind(t["kind"]), t["dtype"], t["heads"], tuple(t["dims"]), t.get("window_tokens")
                        )
                        for t in layer
                    )
                )
                for layer in data["layers"]
            )
        )


def model_fingerprint(parts: Iterable[tuple[str, bytes]]) -> str:
    """32 hex digits that name a model's weights and config: `parts` are (file name, digest of its content), sorted."""
    digest = hashlib.blake2b(digest_size=16)
    for name, content_digest in sorted(parts):
        digest.update(name.encode() + b"\0" + content_digest)
    return digest.hexdigest()
