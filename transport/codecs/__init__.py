"""Lossless codecs of chunks; pure functions over bytes. `registry.CODECS` lists them."""
