"""lz4 behind the byte planes: ~1.2 times smaller on real KV, fast."""

from __future__ import annotations

import lz4.block
import numpy as np
from prfaas.transport.codecs.api import ChunkForm, CodecError
from prfaas.transport.codecs.planes import from_planes, to_planes


class Lz4Codec:
    name = "lz4"
    number = 1
    lossless = True

    def encode(self, data: memoryview, form: ChunkForm) -> bytes | None:
        wire: bytes = lz4.block.compress(to_planes(data, form.dtype), store_size=False)
        return wire if len(wire) < len(data) else None

    def decode(self, wire: memoryview, out: memoryview, form: ChunkForm) -> None:
        try:
            planes = lz4.block.decompress(wire, uncompressed_size=len(out))
        except lz4.block.LZ4BlockError as error:
            raise CodecError(f"lz4: {error}") from None
        if len(planes) != len(out):
            raise CodecError(f"lz4: {len(planes)} bytes, not {len(out)}")
        from_planes(np.frombuffer(planes, np.uint8), out, form.dtype)
