"""zstd level 1 behind the byte planes: ~1.5 times smaller on real KV, close to the exponents' entropy."""

from __future__ import annotations

import numpy as np
import zstandard
from prfaas.transport.codecs.api import ChunkForm, CodecError
from prfaas.transport.codecs.planes import from_planes, to_planes

LEVEL = 1


class ZstdCodec:
    name = "zstd"
    number = 2
    lossless = True

    def encode(self, data: memoryview, form: ChunkForm) -> bytes | None:
        # (De)compressor objects are not thread-safe and cheap beside a chunk.
        wire = zstandard.ZstdCompressor(level=LEVEL).compress(to_planes(data, form.dtype).data)
        return wire if len(wire) < len(data) else None

    def decode(self, wire: memoryview, out: memoryview, form: ChunkForm) -> None:
        try:
            # The library allocates what the frame announces: look before letting it.
            announced = zstandard.frame_content_size(wire)
            if announced != len(out):
                raise CodecError(f"zstd: the frame announces {announced} bytes, not {len(out)}")
            planes = zstandard.ZstdDecompressor().decompress(wire, max_output_size=len(out))
        except zstandard.ZstdError as error:
            raise CodecError(f"zstd: {error}") from None
        if len(planes) != len(out):
            raise CodecError(f"zstd: {len(planes)} bytes, not {len(out)}")
        from_planes(np.frombuffer(planes, np.uint8), out, form.dtype)
