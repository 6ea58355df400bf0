"""Which codecs there are, by name (settings, HELLO) and by number (chunk header). `raw` is number 0 and no codec: its
bytes go from memory to memory without a copy."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from prfaas.transport.codecs.api import Codec
from prfaas.transport.codecs.lossless import LZ4, ZSTD
from prfaas.transport.codecs.quantised import FP8, INT4, INT8

_ALL: tuple[Codec, ...] = (LZ4, ZSTD, INT8, FP8, INT4)
CODECS: Mapping[int, Codec] = MappingProxyType({codec.number: codec for codec in _ALL})
CODEC_NAMES = ("raw", *(codec.name for codec in _ALL))
LOSSLESS_NAMES = ("raw", *(codec.name for codec in _ALL if codec.lossless))


def codec_by_name(name: str) -> Codec | None:
    """None for `raw`."""
    return next((codec for codec in CODECS.values() if codec.name == name), None)
